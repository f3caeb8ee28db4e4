"""Proves that the Flax models and their PyTorch originals agree, number by number."""
