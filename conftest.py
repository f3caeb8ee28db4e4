"""Tests' programs are compiled without optimization: each runs once, and that is most of it."""

import os

# Nor are they kept, or read from what other runs kept.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
