"""Positions that somebody's own model interpolates from a table of another grid."""

import types

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from unetr_flax.inference.testing import tiny_config
from unetr_flax.parity.diagnose import diagnose
from unetr_flax.parity.own_module import adopt
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.parity.twins import make_twins, precise, randomize
from unetr_flax.weights import from_torch, resize_position_embedding, to_torch

CFG = tiny_config(2)


def resized_twins(mode):
    """Makes twins of a checkpoint that was resized, and of a module that resizes its own table."""
    original = torch_model_of(CFG)
    randomize(original, seed=3)
    cfg, variables = resize_position_embedding(
        CFG, from_torch(original.state_dict(), CFG), (24, 16, 32)
    )
    state_dict = to_torch(variables, cfg)
    own = torch_model_of(cfg)
    own.embedding.position_embeddings = torch.nn.Parameter(torch.randn(1, 8, cfg.hidden_size))

    def forward(self, x):
        grid = rearrange(self.position_embeddings, "b (h w d) e -> b e h w d", h=2, w=2)
        position = F.interpolate(grid, cfg.grid_size, mode=mode)
        return rearrange(self.patch_embeddings(x) + position, "b e h w d -> b (h w d) e")

    own.embedding.forward = types.MethodType(forward, own.embedding)
    adopt(own, state_dict, cfg)
    return make_twins(cfg, "float64", batch=1, state_dict=state_dict, torch_model=own)


@pytest.mark.parametrize(
    ("mode", "words"), [("nearest", "by nearest neighbors"), ("trilinear", "linearly on the grid")]
)
def test_interpolated_positions_are_named(mode, words):
    with precise():
        (finding,) = diagnose(resized_twins(mode))
    assert finding.name == "transformer.layers.0.0.norm"
    assert finding.cause == f"position embedding interpolated {words} in PyTorch"
