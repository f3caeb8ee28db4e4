"""The platform that the Flax side of a comparison runs on."""

import jax

from unetr_flax.runtime.compilation_cache import keep_compiled_programs


def use_platform(platform: str) -> None:
    """Makes JAX compute on a platform; call it before JAX computes anything.

    Compiled programs are kept for later runs, as compiling is most of a run's time.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: if there is no such device, or others can write to the folder of programs.
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
    keep_compiled_programs()
