"""The training application: python -m train."""

import importlib.util
import os

# Of every CPU program that comes out of the compilation cache, XLA's loader says at length that
# the host lacks "prefer-no-gather" and that SIGILL is near; that is a preference of the code
# generator, which no host has (openxla/xla#44565). It can only be told to be silent before JAX is
# imported, and altogether, so where there are accelerators it is not.
if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
