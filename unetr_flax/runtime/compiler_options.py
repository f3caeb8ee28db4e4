"""Options under which XLA compiles UNETR best; programs pass them to `jax.jit`."""

import functools
import os

import jax

# Measured at 96^3 on a CPU with AVX-512. LLVM's higher optimization levels take a tenth of the time
# to compile a training step and make it no faster. Vectors as wide as the registers (XLA's default
# is half of that) save 1 % of a training step and 3 % of MONAI's forward pass.
_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512}}

# Of a program that runs once, compiling takes most of the time, and most of that is LLVM's.
_OPTIONS_TO_RUN_ONCE = {"cpu": {"xla_backend_optimization_level": 0}}


def compiler_options(platform: str | None = None) -> dict[str, int | bool]:
    """Returns options for `jax.jit(..., compiler_options=...)` under which UNETR runs best.

    Args:
      platform: the platform of the program, "cpu", "gpu" or "tpu"; JAX's default if None.

    Returns:
      Values by name, without options that this version of XLA does not know or that the
      environment variable XLA_FLAGS sets. Empty for GPU and TPU.
    """
    return _usable(_OPTIONS.get(platform or jax.default_backend(), {}))


def options_to_run_once(platform: str | None = None) -> dict[str, int | bool]:
    """Returns options for a program of which compiling takes longer than its few runs.

    Operations, and what each of them computes, are the same; arguments and result are those of
    `compiler_options`.
    """
    return _usable(_OPTIONS_TO_RUN_ONCE.get(platform or jax.default_backend(), {}))


def _usable(options: dict[str, int]) -> dict[str, int | bool]:
    """Leaves out what this version of XLA does not know and what XLA_FLAGS sets."""
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
