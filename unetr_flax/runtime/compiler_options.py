"""What XLA is told when it compiles UNETR: a choice of programs, not of the library."""

import functools
import os

import jax

# Measured at 96^3 on a CPU with AVX-512: LLVM's further optimization takes a tenth of a training
# step's compile time for no speed; vectors as wide as the registers save 1 % of it, and 3 % of
# MONAI's forward pass. XLA's default is half of that.
_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512}}


def compiler_options(platform: str | None = None) -> dict[str, int | bool]:
    """Options for `jax.jit(..., compiler_options=...)` under which UNETR runs best.

    Args:
      platform: where the program will run: "cpu", "gpu" or "tpu"; JAX's default if None.

    Returns:
      Those options that this version of XLA knows and the environment's XLA_FLAGS leave open; none
      for most platforms.
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
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
