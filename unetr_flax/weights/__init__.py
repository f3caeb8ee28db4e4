"""Weights between PyTorch and Flax, in memory and in files. Only files of torch.save need torch."""

from unetr_flax.weights.convert import from_torch, to_torch
from unetr_flax.weights.errors import CheckpointError, WeightsError
from unetr_flax.weights.files import StateDictFile, read_state_dict, write_state_dict
from unetr_flax.weights.infer import infer_config
from unetr_flax.weights.pretrained import load_pretrained, read_metadata, save_pretrained
from unetr_flax.weights.resize import resize_position_embedding

__all__ = [
    "CheckpointError",
    "StateDictFile",
    "WeightsError",
    "from_torch",
    "infer_config",
    "load_pretrained",
    "read_metadata",
    "read_state_dict",
    "resize_position_embedding",
    "save_pretrained",
    "to_torch",
    "write_state_dict",
]
