"""Proves that the Flax models and their PyTorch originals agree, number by number."""

import importlib.util
import os

# As in `train/__init__.py`: XLA's groundless words about each CPU program from the cache.
if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
