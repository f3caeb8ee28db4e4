"""Measures this project beside PyTorch and plain Flax."""
