"""Errors of PyTorch ports, to be planted in the PyTorch model, with the cause to be named.

Each of them changes a model that stands in for somebody's own port.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn

from parity_tests import configs
from parity_tests.torch_faults import (
    ATTENTION,
    FastGELU,
    both,
    change_attention,
    change_blocks,
    change_embedding,
    change_input,
    change_output,
    change_weight,
    halves,
    hidden_one_early,
    in_narrow_format,
    in_training,
    interpolated,
    misread_positions,
    no_residual,
    no_shortcut,
    post_norm,
    replace_module,
    round_products,
    set_attributes,
    transposed_positions,
)
from unetr_flax import UNETRConfig
from unetr_flax.parity.diagnose import Finding

REFERENCE = configs.SMALL
MONAI = UNETRConfig.monai(
    (32, 48),
    2,
    3,
    feature_size=4,
    hidden_size=24,
    mlp_dim=40,
    num_heads=3,
    proj_type="perceptron",
    qkv_bias=True,
)


@dataclasses.dataclass(frozen=True)
class TorchError:
    """One mistake in a PyTorch model.

    Attributes:
      name: the error in words.
      cfg: configuration of the model.
      plant: plants the error in a model of this configuration.
      named: for each differing module, words that the named cause must have; the first in forward
        order first, "name of the module: words".
      masked: whether the comparison is that with an attention mask.
    """

    name: str
    cfg: UNETRConfig
    plant: Callable[[Any], None]
    named: tuple[str, ...]
    masked: bool = False

    def is_named(self, findings: list[Finding]) -> bool:
        """Returns whether all causes are named, and nothing else is accused."""
        told = [f"{finding.name}: {finding}" for finding in findings]
        named = []
        for words in self.named:
            name, _, cause = words.partition(": ")
            parts = cause.split(" and ")
            named.append(
                [t for t in told if t.startswith(f"{name}: ") and all(part in t for part in parts)]
            )
        if not all(named) or not told[0].startswith(self.named[0].partition(": ")[0]):
            return False
        # A cause of a whole architecture shows in every block.
        everywhere = "post-norm" in self.named[0] and all("post-norm" in t for t in told)
        return everywhere or len(told) == len(self.named)


NORM = "transformer.layers.2.1.norm"
MLP = "transformer.layers.1.1.fn"
BATCH_NORM = "decoder6_upsampler.0.block.1"
CONV = "decoder6_upsampler.1.block.0.block"
DECONV = "decoder9_upsampler.3.block"

_R, _M = REFERENCE, MONAI
TORCH_ERRORS = tuple(
    TorchError(name, cfg, plant, (named,) if isinstance(named, str) else named, *masked)
    for name, cfg, plant, named, *masked in (
        (
            "LayerNorm epsilon 1e-6",
            _R,
            set_attributes(NORM, eps=1e-6),
            f"{NORM}: epsilon 1e-06 instead of",
        ),
        ("LayerNorm epsilon 1e-12", _R, set_attributes(NORM, eps=1e-12), f"{NORM}: epsilon 1e-12"),
        ("LayerNorm without bias", _R, set_attributes(NORM, bias=None), f"{NORM}: bias dropped"),
        ("LayerNorm left out", _R, replace_module(NORM, nn.Identity()), f"{NORM}: norm left out"),
        (
            "BatchNorm epsilon 1e-3",
            _R,
            set_attributes(BATCH_NORM, eps=1e-3),
            f"{BATCH_NORM}: epsilon 0.001",
        ),
        ("batch statistics", _R, in_training(BATCH_NORM), f"{BATCH_NORM}: batch's own statistics"),
        (
            "stale running statistics",
            _R,
            lambda model: model.get_submodule(BATCH_NORM).reset_running_stats(),
            f"{BATCH_NORM}: initial running statistics",
        ),
        ("GELU by tanh", _R, replace_module(f"{MLP}.1", nn.GELU("tanh")), f"{MLP}.3: GELU by tanh"),
        ("fast GELU", _R, replace_module(f"{MLP}.1", FastGELU()), f"{MLP}.3: GELU by sigmoid"),
        ("ReLU for GELU", _R, replace_module(f"{MLP}.1", nn.ReLU()), f"{MLP}.3: ReLU instead of"),
        (
            "LeakyReLU for ReLU",
            _R,
            replace_module("decoder6_upsampler.0.block.2", nn.LeakyReLU(0.01)),
            "decoder6_upsampler.0: LeakyReLU of slope 0.01 instead of ReLU",
        ),
        (
            "attention scaled by the head's width",
            _R,
            set_attributes(ATTENTION, emb_size=8),
            f"{ATTENTION}.projection: attention scaled by the head's width",
        ),
        (
            "attention not scaled",
            _R,
            set_attributes(ATTENTION, emb_size=1),
            f"{ATTENTION}.projection: attention not scaled",
        ),
        (
            "attention scaled after the softmax",
            _R,
            change_attention(after=True),
            f"{ATTENTION}.projection: scaled after the softmax",
        ),
        (
            "softmax over queries",
            _R,
            change_attention(softmax=-2),
            f"{ATTENTION}.projection: softmax over the queries",
        ),
        (
            "qkv split as (qkv h d)",
            _R,
            change_attention("(qkv h d)"),
            f"{ATTENTION}.projection: split as (qkv h d)",
        ),
        (
            "queries and keys exchanged",
            _R,
            change_attention(roles="kqv"),
            f"{ATTENTION}.projection: k, q, v taken for q, k, v",
        ),
        (
            "heads joined as (d h)",
            _R,
            change_attention(join="(d h)"),
            f"{ATTENTION}.projection: heads joined as (d h)",
        ),
        (
            "mask ignored",
            _R,
            change_attention(mask_as="ignored"),
            f"{ATTENTION}.projection: mask ignored",
            True,
        ),
        (
            "mask inverted",
            _R,
            change_attention(mask_as="inverted"),
            f"{ATTENTION}.projection: mask inverted",
            True,
        ),
        (
            "qkv bias dropped",
            _R,
            set_attributes(f"{ATTENTION}.qkv", bias=None),
            f"{ATTENTION}.qkv: bias dropped",
        ),
        ("post-norm", _R, change_blocks(post_norm), "transformer.layers.0.0.norm: post-norm"),
        (
            "no sum around attention",
            _R,
            change_blocks(no_residual),
            "transformer.layers.1.1.norm: residual sum around attention left out",
        ),
        (
            "extra final norm",
            _R,
            change_output("transformer", lambda z: [*z[:3], F.layer_norm(z[3], z[3].shape[-1:])]),
            "transformer.layers.4.1.fn.3: norm without parameters",
        ),
        (
            "skips exchanged",
            _R,
            change_output("transformer", lambda z: [z[1], z[0], *z[2:]]),
            (
                "decoder6.0.block.0.block: feature after block 1 instead of 2",
                "decoder3.0.block.0.block: feature after block 2 instead of 1",
            ),
        ),
        (
            "position embedding missing",
            _R,
            change_embedding(lambda x, p, grid: x),
            "transformer.layers.0.0.norm: position embedding missing",
        ),
        (
            "position embedding twice",
            _R,
            change_embedding(lambda x, p, grid: x + 2 * p),
            "transformer.layers.0.0.norm: position embedding added twice",
        ),
        (
            "position embedding transposed",
            _R,
            change_embedding(transposed_positions),
            "transformer.layers.0.0.norm: position embedding transposed",
        ),
        (
            "position embedding laid out as (d w h)",
            _R,
            change_embedding(misread_positions),
            "transformer.layers.0.0.norm: position embedding laid out",
        ),
        (
            "patches flattened in another order",
            _R,
            change_embedding(lambda x, p, grid: x + p, "b e h w d -> b (d w h) e"),
            "transformer.layers.0.0.norm: patches flattened",
        ),
        (
            "deconvolution kernel flipped",
            _R,
            change_weight(DECONV, lambda w: w.flip((2, 3, 4))),
            f"{DECONV}: kernel flipped",
        ),
        (
            "convolution kernel transposed",
            _R,
            change_weight(CONV, lambda w: w.permute(0, 1, 4, 3, 2)),
            f"{CONV}: spatial axes in the order (2, 1, 0)",
        ),
        (
            "padded by reflection",
            _R,
            set_attributes(CONV, padding_mode="reflect"),
            f"{CONV}: padded by reflection",
        ),
        ("convolution without bias", _R, set_attributes(CONV, bias=None), f"{CONV}: bias dropped"),
        (
            "interpolation for a deconvolution",
            _R,
            interpolated("trilinear"),
            "decoder6.1.block.0.block: up-sampled by linear interpolation",
        ),
        (
            "nearest neighbors for a deconvolution",
            _R,
            interpolated("nearest"),
            "decoder6.1.block.0.block: up-sampled by nearest neighbors",
        ),
        (
            "halves of a concatenation exchanged",
            _R,
            change_input("decoder9_upsampler", halves),
            "decoder9_upsampler.0.block.0.block: up-sampled features before the skip",
        ),
        (
            "dropout left on in the embedding",
            _R,
            in_training("embedding.dropout", 0.25),
            "transformer.layers.0.0.norm: dropout of rate 0.25",
        ),
        (
            "dropout left on in attention",
            _R,
            in_training(f"{ATTENTION}.att_drop", 0.25),
            f"{ATTENTION}.projection: dropout active on the attention weights",
        ),
        (
            "dropout left on in the feed-forward layer",
            _R,
            in_training(f"{MLP}.2", 0.1),
            f"{MLP}.3: dropout of rate 0.1",
        ),
        (
            "image normalized inside",
            _R,
            change_input(
                "",
                lambda x: (
                    (x - x.mean((2, 3, 4), True)) / x.std((2, 3, 4), keepdim=True, correction=0)
                ),
            ),
            (
                "embedding.patch_embeddings: image normalized",
                "decoder0.0.block.0.block: image normalized",
            ),
        ),
        (
            "image's axes exchanged",
            _R,
            change_input("", lambda x: x.transpose(2, 4)),
            (
                "embedding.patch_embeddings: spatial axes in the order (2, 1, 0)",
                "decoder0.0.block.0.block: spatial axes in the order (2, 1, 0)",
            ),
        ),
        (
            "image's channels reversed for the encoder",
            _R,
            change_input("embedding", lambda x: x.flip(1)),
            "embedding.patch_embeddings: channels in reverse order",
        ),
        ("softmax on logits", _R, change_output("", lambda y: y.softmax(1)), "logits: softmax"),
        (
            "linear map in float32",
            _R,
            in_narrow_format(f"{MLP}.0"),
            f"{MLP}.0: computed in float32",
        ),
        (
            "linear map in bfloat16",
            _R,
            in_narrow_format(f"{MLP}.0", torch.bfloat16),
            f"{MLP}.0: computed in bfloat16",
        ),
        (
            "products of TF32 numbers",
            _R,
            round_products(f"{MLP}.0", "tf32"),
            f"{MLP}.0: products of TF32 or float16 numbers",
        ),
        (
            "products of bfloat16 numbers",
            _R,
            round_products(f"{MLP}.0", "bfloat16"),
            f"{MLP}.0: products of bfloat16 numbers",
        ),
        (
            "epsilon and GELU at once",
            _R,
            both(set_attributes(NORM, eps=1e-6), replace_module(f"{MLP}.1", nn.GELU("tanh"))),
            (f"{MLP}.3: GELU by tanh", f"{NORM}: epsilon 1e-06"),
        ),
        (
            "epsilon and bias in one norm",
            _R,
            set_attributes(NORM, eps=1e-3, bias=None),
            f"{NORM}: epsilon 0.001 instead of 1e-05 and bias dropped",
        ),
        (
            "final norm missing",
            _M,
            replace_module("vit.norm", nn.Identity()),
            "vit.norm: norm left out",
        ),
        (
            "features one block early",
            _M,
            change_output("vit", hidden_one_early),
            (
                "encoder4.transp_conv_init.conv: feature after block 9 instead of 10",
                "encoder3.transp_conv_init.conv: feature after block 6 instead of 7",
                "encoder2.transp_conv_init.conv: feature after block 3 instead of 4",
            ),
        ),
        (
            "InstanceNorm epsilon 1e-6",
            _M,
            set_attributes("decoder4.conv_block.norm1", eps=1e-6),
            "decoder4.conv_block.norm1: epsilon 1e-06 instead of 1e-05",
        ),
        (
            "statistics over all channels",
            _M,
            replace_module("decoder4.conv_block.norm1", nn.GroupNorm(1, 16, affine=False)),
            "decoder4.conv_block.norm1: group norm and statistics over all channels",
        ),
        (
            "LeakyReLU of slope 0.2",
            _M,
            replace_module("decoder4.conv_block.lrelu", nn.LeakyReLU(0.2)),
            (
                "decoder4.conv_block.conv2.conv: LeakyReLU of slope 0.2 instead of 0.01",
                "decoder4.conv_block: LeakyReLU of slope 0.2 instead of 0.01",
            ),
        ),
        (
            "no shortcut",
            _M,
            no_shortcut,
            (
                "decoder4.conv_block.conv3.conv: never calls",
                "decoder4.conv_block.norm3: never calls",
                "decoder4.conv_block: shortcut left out",
            ),
        ),
        (
            "concatenation in the other order",
            _M,
            change_input("decoder3.conv_block", halves),
            "decoder3.conv_block.conv1.conv: skip before the up-sampled features",
        ),
        (
            "patches flattened with channels first",
            _M,
            replace_module(
                "vit.patch_embedding.patch_embeddings.0",
                Rearrange("b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=16, p2=16),
            ),
            "vit.patch_embedding.patch_embeddings.1: channels first",
        ),
        (
            "attention scaled by the embedding's width",
            _M,
            set_attributes("vit.blocks.3.attn", scale=24**-0.5),
            "vit.blocks.3.attn.out_proj: attention scaled by the embedding's width",
        ),
        (
            "an own idea that nobody knows",
            _M,
            change_output("vit.blocks.3.mlp.linear1", lambda y: y + 0.01 * y.roll(1, -1) ** 2),
            "vit.blocks.3.mlp.linear1: no known cause",
        ),
    )
)
