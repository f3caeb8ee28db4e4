"""Tests' programs are compiled without optimisation: each runs once, and that is most of it."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
