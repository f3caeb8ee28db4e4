"""The training application: python -m train."""

import importlib.util
import os
import time

# The time of --budget begins before JAX is imported, which takes seconds.
STARTED = time.monotonic()

# For every CPU program from the compilation cache, XLA's loader logs at length that the host lacks
# "prefer-no-gather" and may raise SIGILL. That is a preference of the code generator, not a feature
# of any host (openxla/xla#44565). The log can only be silenced before JAX is imported, and only
# altogether, so it stays on where there are accelerators.
if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
