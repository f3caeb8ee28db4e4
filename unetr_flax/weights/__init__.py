"""Weights between PyTorch and Flax, in memory and in files. Only files of torch.save need torch."""

from unetr_flax.weights.convert import WeightsError, from_torch, to_torch
from unetr_flax.weights.files import StateDictFile, read_state_dict, write_state_dict
from unetr_flax.weights.pretrained import load_pretrained, read_metadata, save_pretrained
from unetr_flax.weights.resize import resize_position_embedding
from unetr_flax.weights.unwrap import CheckpointError

__all__ = [
    "CheckpointError",
    "StateDictFile",
    "WeightsError",
    "from_torch",
    "load_pretrained",
    "read_metadata",
    "read_state_dict",
    "resize_position_embedding",
    "save_pretrained",
    "to_torch",
    "write_state_dict",
]
