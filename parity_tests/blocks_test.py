"""Compares each block of the two models alone: the same input and weights, value and gradients."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax import traverse_util

import unetr_torch_ref as reference
from parity_tests import configs
from unetr_flax.model import blocks, encoder
from unetr_flax.parity.activations import TOKEN_KINDS
from unetr_flax.parity.rows import assert_rows, compare_arrays
from unetr_flax.parity.twins import channels_first, channels_first_tensor, precise, randomize
from unetr_flax.weights.families.reference import TABLE
from unetr_flax.weights.mapping import ModulePair, array_pairs, with_parts

CFG = configs.SMALL
E, H = CFG.hidden_size, CFG.num_heads
GRID = (2, 6, 3, 5, 4)  # batch, three unequal axes, channels
TOKENS = (2, 7, E)

BLOCKS = {
    "single_conv": (blocks.SingleConv3DBlock(5), reference.SingleConv3DBlock(4, 5, 3), GRID),
    "single_conv 1x1x1": (
        blocks.SingleConv3DBlock(5, 1),
        reference.SingleConv3DBlock(4, 5, 1),
        GRID,
    ),
    "single_deconv": (
        blocks.SingleDeconv3DBlock(5, (2, 2, 2)),
        reference.SingleDeconv3DBlock(4, 5),
        GRID,
    ),
    "single_deconv mixed strides": (
        blocks.SingleDeconv3DBlock(5, (1, 2, 1)),
        reference.SingleDeconv3DBlock(4, 5, (1, 2, 1)),
        GRID,
    ),
    "batch_norm": (blocks.BatchNorm(), torch.nn.BatchNorm3d(4), GRID),
    "conv_block": (blocks.Conv3DBlock(5), reference.Conv3DBlock(4, 5), GRID),
    "deconv_block": (blocks.Deconv3DBlock(5, (2, 2, 2)), reference.Deconv3DBlock(4, 5), GRID),
    "embedding": (
        encoder.PatchEmbedding(CFG),
        reference.Embeddings((CFG.in_channels, *CFG.img_size), CFG.patch_size, E),
        (2, *CFG.img_size, CFG.in_channels),
    ),
    "norm": (nn.LayerNorm(epsilon=1e-5, use_fast_variance=False), torch.nn.LayerNorm(E), TOKENS),
    "attention": (encoder.MultiHeadAttention(CFG), reference.MultiHeadAttention(E, H), TOKENS),
    "feed_forward": (encoder.FeedForward(CFG), reference.FeedForwardBlock(E), TOKENS),
}


def flax_variables(torch_module: torch.nn.Module, kind: str):
    state = torch_module.state_dict()
    return traverse_util.unflatten_dict(
        {
            pair.flax_path: pair.layout.to_flax(state[pair.torch_keys[0]].numpy(), h=H, qkv=3)
            for pair in array_pairs(with_parts(ModulePair("", (), kind), TABLE), TABLE)
        }
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, dtype):
    module, torch_module, shape = BLOCKS[name]
    kind = name.split()[0]
    torch_module = torch_module.to(getattr(torch, dtype)).eval()
    torch_module.zero_grad()  # the same module is tested in both dtypes, and gradients add up
    randomize(torch_module, seed=0)
    on_grid = kind not in TOKEN_KINDS or kind == "embedding"
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    x_torch = (channels_first_tensor(x) if on_grid else torch.from_numpy(x)).requires_grad_()
    theirs = torch_module(x_torch)
    cotangent = np.random.default_rng(2).standard_normal(theirs.shape).astype(dtype)
    theirs.backward(torch.from_numpy(cotangent))

    with precise():
        variables = flax_variables(torch_module, kind)
        module = module.clone(param_dtype=np.dtype(dtype))

        def forward(params, x):
            y = module.apply({**variables, "params": params}, x)
            return y if kind in TOKEN_KINDS else jax.numpy.moveaxis(y, -1, 1)

        ours, vjp = jax.vjp(jax.jit(forward), variables["params"], x)
        params_grad, x_grad = vjp(cotangent)

    rows = [compare_arrays(name, "output", ours, theirs.detach().numpy())]
    if dtype == "float64":
        x_grad = channels_first(x_grad) if on_grid else x_grad
        rows.append(compare_arrays(name, "gradient of the input", x_grad, x_torch.grad.numpy()))
        grads = traverse_util.flatten_dict({"params": params_grad})
        parameters = dict(torch_module.named_parameters())
        for pair in array_pairs(with_parts(ModulePair("", (), kind), TABLE), TABLE):
            (key,) = pair.torch_keys
            if key in parameters:
                grad = pair.layout.to_torch(np.asarray(grads[pair.flax_path]), h=H, qkv=3)
                rows.append(compare_arrays(name, key, grad, parameters[key].grad.numpy()))
    assert_rows(rows)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_attention_with_mask(dtype):
    torch_module = reference.MultiHeadAttention(E, H).to(getattr(torch, dtype)).eval()
    randomize(torch_module, seed=0)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(TOKENS).astype(dtype)
    mask = rng.random((2, 1, 7, 7)) < 0.5
    mask[0, 0, 0] = False
    theirs = torch_module(torch.from_numpy(x), mask=torch.from_numpy(mask)).detach().numpy()
    with precise():
        module = encoder.MultiHeadAttention(CFG, param_dtype=np.dtype(dtype))
        ours = jax.jit(module.apply)(flax_variables(torch_module, "attention"), x, mask)
    assert_rows([compare_arrays("attention", "masked output", ours, theirs)])
