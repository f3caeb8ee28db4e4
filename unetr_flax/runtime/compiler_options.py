"""Options under which XLA compiles UNETR best; programs pass them to `jax.jit`."""

import functools
import os

import jax

# Measured at 96^3 on a CPU with AVX-512. LLVM's higher optimization levels take a tenth of the time
# to compile a training step and make it no faster. Vectors as wide as the registers (XLA's default
# is half of that) save 1 % of a training step and 3 % of MONAI's forward pass.
_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512}}


def compiler_options(platform: str | None = None) -> dict[str, int | bool]:
    """Returns options for `jax.jit(..., compiler_options=...)` under which UNETR runs best.

    Args:
      platform: the platform of the program, "cpu", "gpu" or "tpu"; JAX's default if None.

    Returns:
      Values by name, without options that this version of XLA does not know or that the
      environment variable XLA_FLAGS sets. Empty for GPU and TPU.
    """
    options = _OPTIONS.get(platform or jax.default_backend(), {})
    given = os.environ.get("XLA_FLAGS", "")
    return {
        name: value
        for name, value in options.items()
        if name not in given and _is_known(name, value)
    }


@functools.cache
def _is_known(name: str, value: int | bool) -> bool:
    """Tells whether this version of XLA has an option, by compiling an empty program with it."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
