"""The platform that the Flax side of a comparison runs on."""

import jax


def use_platform(platform: str) -> None:
    """Makes JAX compute on a platform; call it before JAX computes anything.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: if there is no such device.
    """
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:
        raise ValueError(
            f"--platform {platform}: jax {jax.__version__} finds no such device, only "
            f"{jax.default_backend()}"
        ) from None
    if jax.default_backend() != platform:
        jax.config.update("jax_default_device", device)
