"""Weights between PyTorch and Flax."""

from unetr_flax.weights.convert import WeightsError, from_torch, to_torch

__all__ = ["WeightsError", "from_torch", "to_torch"]
