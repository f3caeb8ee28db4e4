"""Errors of PyTorch ports, to be planted in the PyTorch model, with the cause to be named.

Each of them changes a model that stands in for somebody's own port.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn

from parity_tests import configs
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


def _forward(module: nn.Module, forward: Callable) -> None:
    module.forward = types.MethodType(forward, module)


def _set(path: str, **values: Any) -> Callable[[Any], None]:
    """Sets attributes of a submodule."""

    def plant(model):
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return plant


def _replace(path: str, new: nn.Module) -> Callable[[Any], None]:
    """Replaces a submodule."""
    parent, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(parent), name, new)


def _weight(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Changes the weight of a submodule."""

    def plant(model):
        weight = model.get_submodule(path).weight
        weight.data = change(weight.data).contiguous()

    return plant


def _before(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Changes what a submodule is given."""
    return lambda model: model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: (change(args[0]), *args[1:])
    )


def _after(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Changes what a submodule returns."""
    return lambda model: model.get_submodule(path).register_forward_hook(
        lambda module, args, output: change(output)
    )


def _both(*plants: Callable[[Any], None]) -> Callable[[Any], None]:
    def plant(model):
        for one in plants:
            one(model)

    return plant


def _training(path: str, rate: float | None = None) -> Callable[[Any], None]:
    """Leaves the training mode of a submodule on."""

    def plant(model):
        module = model.get_submodule(path)
        if rate is not None:
            module.p = rate
        module.train()

    return plant


ATTENTION = "transformer.layers.1.0.fn"


def _attention(
    order: str = "(h d qkv)",
    roles: str = "qkv",
    join: str = "(h d)",
    after: bool = False,
    softmax: int = -1,
    mask_as: str = "applied",
) -> Callable[[Any], None]:
    """Replaces the attention of one block."""

    def forward(self, x, mask=None):
        qkv = rearrange(self.qkv(x), f"b n {order} -> qkv b h n d", h=self.num_heads, qkv=3)
        query, key, value = (qkv["qkv".index(role)] for role in roles)
        energy = query @ key.transpose(-1, -2)
        if mask is not None and mask_as != "ignored":
            energy = energy.masked_fill(
                mask if mask_as == "inverted" else ~mask, torch.finfo(energy.dtype).min
            )
        scale = self.emb_size**-0.5
        weights = (energy if after else energy * scale).softmax(softmax)
        out = self.att_drop(weights * scale if after else weights) @ value
        return self.projection(rearrange(out, f"b h n d -> b n {join}"))

    return lambda model: _forward(model.get_submodule(ATTENTION), forward)


def _blocks(step: Callable) -> Callable[[Any], None]:
    """Replaces what the reference's transformer does in each block."""

    def forward(self, x, mask=None):
        extracted = []
        for number, layer in enumerate(self.layers, start=1):
            x = step(x, *layer.children(), number)
            if number in self.extract_layers:
                extracted.append(x)
        return extracted

    return lambda model: _forward(model.transformer, forward)


def _post_norm(x, attention, mlp, number):
    x = attention.norm(x + attention.fn(x))
    return mlp.norm(x + mlp.fn(x))


def _no_residual(x, attention, mlp, number):
    x = attention(x) if number == 2 else attention(x) + x
    return mlp(x) + x


def _embedding(add: Callable, flatten: str = "b e h w d -> b (h w d) e") -> Callable[[Any], None]:
    """Replaces the reference's sum of patches and positions."""

    def forward(self, x):
        x = rearrange(self.patch_embeddings(x), flatten)
        return self.dropout(add(x, self.position_embeddings, self.patch_dim))

    return lambda model: _forward(model.embedding, forward)


def _transposed_positions(x, position, grid):
    h, w, d = grid
    return x + rearrange(position, "b (h w d) e -> b (d w h) e", h=h, w=w, d=d)


def _misread_positions(x, position, grid):
    h, w, d = grid
    return x + rearrange(position, "b (d w h) e -> b (h w d) e", h=h, w=w, d=d)


def _interpolated(mode: str) -> Callable[[Any], None]:
    def forward(self, x):
        strides = tuple(map(float, self.weight.shape[2:]))
        y = F.interpolate(x, scale_factor=strides, mode=mode)
        mixed = torch.einsum("bi...,io->bo...", y, self.weight.mean((2, 3, 4)))
        return mixed + self.bias.reshape(1, -1, 1, 1, 1)

    return lambda model: _forward(model.get_submodule("decoder6.1.block.0.block"), forward)


class FastGELU(nn.Module):
    """GELU by a sigmoid."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def _in_float32(path: str, dtype: torch.dtype = torch.float32) -> Callable[[Any], None]:
    """Computes a linear map in a shorter format."""

    def forward(self, x):
        bias = self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    return lambda model: _forward(model.get_submodule(path), forward)


def _rounded_products(path: str, precision: str) -> Callable[[Any], None]:
    """Rounds the operands of a linear map, as fast units of processors do."""

    def rounded(x):
        if precision == "bfloat16":
            return x.bfloat16().to(x.dtype)
        mantissa, exponent = torch.frexp(x.float())
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11).to(x.dtype)

    def forward(self, x):
        return F.linear(rounded(x), rounded(self.weight), self.bias)

    return lambda model: _forward(model.get_submodule(path), forward)


def _hidden_one_early(output):
    last, hidden = output
    return last, [hidden[0], *hidden[:-1]]


def _no_shortcut(model):
    def forward(self, x):
        y = self.lrelu(self.norm1(self.conv1(x)))
        return self.lrelu(self.norm2(self.conv2(y)))

    _forward(model.decoder4.conv_block, forward)


def _halves(x):
    return torch.roll(x, x.shape[1] // 2, 1)


NORM = "transformer.layers.2.1.norm"
MLP = "transformer.layers.1.1.fn"
BATCH_NORM = "decoder6_upsampler.0.block.1"
CONV = "decoder6_upsampler.1.block.0.block"
DECONV = "decoder9_upsampler.3.block"

_R, _M = REFERENCE, MONAI
TORCH_ERRORS = tuple(
    TorchError(name, cfg, plant, (named,) if isinstance(named, str) else named, *masked)
    for name, cfg, plant, named, *masked in (
        ("LayerNorm epsilon 1e-6", _R, _set(NORM, eps=1e-6), f"{NORM}: epsilon 1e-06 instead of"),
        ("LayerNorm epsilon 1e-12", _R, _set(NORM, eps=1e-12), f"{NORM}: epsilon 1e-12"),
        ("LayerNorm without bias", _R, _set(NORM, bias=None), f"{NORM}: bias dropped"),
        ("LayerNorm left out", _R, _replace(NORM, nn.Identity()), f"{NORM}: norm left out"),
        ("BatchNorm epsilon 1e-3", _R, _set(BATCH_NORM, eps=1e-3), f"{BATCH_NORM}: epsilon 0.001"),
        ("batch statistics", _R, _training(BATCH_NORM), f"{BATCH_NORM}: batch's own statistics"),
        (
            "stale running statistics",
            _R,
            lambda model: model.get_submodule(BATCH_NORM).reset_running_stats(),
            f"{BATCH_NORM}: initial running statistics",
        ),
        ("GELU by tanh", _R, _replace(f"{MLP}.1", nn.GELU("tanh")), f"{MLP}.3: GELU by tanh"),
        ("fast GELU", _R, _replace(f"{MLP}.1", FastGELU()), f"{MLP}.3: GELU by sigmoid"),
        ("ReLU for GELU", _R, _replace(f"{MLP}.1", nn.ReLU()), f"{MLP}.3: ReLU instead of"),
        (
            "LeakyReLU for ReLU",
            _R,
            _replace("decoder6_upsampler.0.block.2", nn.LeakyReLU(0.01)),
            "decoder6_upsampler.0: LeakyReLU of slope 0.01 instead of ReLU",
        ),
        (
            "attention scaled by the head's width",
            _R,
            _set(ATTENTION, emb_size=8),
            f"{ATTENTION}.projection: attention scaled by the head's width",
        ),
        (
            "attention not scaled",
            _R,
            _set(ATTENTION, emb_size=1),
            f"{ATTENTION}.projection: attention not scaled",
        ),
        (
            "attention scaled after the softmax",
            _R,
            _attention(after=True),
            f"{ATTENTION}.projection: scaled after the softmax",
        ),
        (
            "softmax over queries",
            _R,
            _attention(softmax=-2),
            f"{ATTENTION}.projection: softmax over the queries",
        ),
        (
            "qkv split as (qkv h d)",
            _R,
            _attention("(qkv h d)"),
            f"{ATTENTION}.projection: split as (qkv h d)",
        ),
        (
            "queries and keys exchanged",
            _R,
            _attention(roles="kqv"),
            f"{ATTENTION}.projection: k, q, v taken for q, k, v",
        ),
        (
            "heads joined as (d h)",
            _R,
            _attention(join="(d h)"),
            f"{ATTENTION}.projection: heads joined as (d h)",
        ),
        (
            "mask ignored",
            _R,
            _attention(mask_as="ignored"),
            f"{ATTENTION}.projection: mask ignored",
            True,
        ),
        (
            "mask inverted",
            _R,
            _attention(mask_as="inverted"),
            f"{ATTENTION}.projection: mask inverted",
            True,
        ),
        (
            "qkv bias dropped",
            _R,
            _set(f"{ATTENTION}.qkv", bias=None),
            f"{ATTENTION}.qkv: bias dropped",
        ),
        ("post-norm", _R, _blocks(_post_norm), "transformer.layers.0.0.norm: post-norm"),
        (
            "no sum around attention",
            _R,
            _blocks(_no_residual),
            "transformer.layers.1.1.norm: residual sum around attention left out",
        ),
        (
            "extra final norm",
            _R,
            _after("transformer", lambda z: [*z[:3], F.layer_norm(z[3], z[3].shape[-1:])]),
            "transformer.layers.4.1.fn.3: norm without parameters",
        ),
        (
            "skips exchanged",
            _R,
            _after("transformer", lambda z: [z[1], z[0], *z[2:]]),
            (
                "decoder6.0.block.0.block: feature after block 1 instead of 2",
                "decoder3.0.block.0.block: feature after block 2 instead of 1",
            ),
        ),
        (
            "position embedding missing",
            _R,
            _embedding(lambda x, p, grid: x),
            "transformer.layers.0.0.norm: position embedding missing",
        ),
        (
            "position embedding twice",
            _R,
            _embedding(lambda x, p, grid: x + 2 * p),
            "transformer.layers.0.0.norm: position embedding added twice",
        ),
        (
            "position embedding transposed",
            _R,
            _embedding(_transposed_positions),
            "transformer.layers.0.0.norm: position embedding transposed",
        ),
        (
            "position embedding laid out as (d w h)",
            _R,
            _embedding(_misread_positions),
            "transformer.layers.0.0.norm: position embedding laid out",
        ),
        (
            "patches flattened in another order",
            _R,
            _embedding(lambda x, p, grid: x + p, "b e h w d -> b (d w h) e"),
            "transformer.layers.0.0.norm: patches flattened",
        ),
        (
            "deconvolution kernel flipped",
            _R,
            _weight(DECONV, lambda w: w.flip((2, 3, 4))),
            f"{DECONV}: kernel flipped",
        ),
        (
            "convolution kernel transposed",
            _R,
            _weight(CONV, lambda w: w.permute(0, 1, 4, 3, 2)),
            f"{CONV}: spatial axes in the order (2, 1, 0)",
        ),
        (
            "padded by reflection",
            _R,
            _set(CONV, padding_mode="reflect"),
            f"{CONV}: padded by reflection",
        ),
        ("convolution without bias", _R, _set(CONV, bias=None), f"{CONV}: bias dropped"),
        (
            "interpolation for a deconvolution",
            _R,
            _interpolated("trilinear"),
            "decoder6.1.block.0.block: up-sampled by linear interpolation",
        ),
        (
            "nearest neighbors for a deconvolution",
            _R,
            _interpolated("nearest"),
            "decoder6.1.block.0.block: up-sampled by nearest neighbors",
        ),
        (
            "halves of a concatenation exchanged",
            _R,
            _before("decoder9_upsampler", _halves),
            "decoder9_upsampler.0.block.0.block: up-sampled features before the skip",
        ),
        (
            "dropout left on in the embedding",
            _R,
            _training("embedding.dropout", 0.25),
            "transformer.layers.0.0.norm: dropout of rate 0.25",
        ),
        (
            "dropout left on in attention",
            _R,
            _training(f"{ATTENTION}.att_drop", 0.25),
            f"{ATTENTION}.projection: dropout active on the attention weights",
        ),
        (
            "dropout left on in the feed-forward layer",
            _R,
            _training(f"{MLP}.2", 0.1),
            f"{MLP}.3: dropout of rate 0.1",
        ),
        (
            "image normalized inside",
            _R,
            _before(
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
            _before("", lambda x: x.transpose(2, 4)),
            (
                "embedding.patch_embeddings: spatial axes in the order (2, 1, 0)",
                "decoder0.0.block.0.block: spatial axes in the order (2, 1, 0)",
            ),
        ),
        (
            "image's channels reversed for the encoder",
            _R,
            _before("embedding", lambda x: x.flip(1)),
            "embedding.patch_embeddings: channels in reverse order",
        ),
        ("softmax on logits", _R, _after("", lambda y: y.softmax(1)), "logits: softmax"),
        ("linear map in float32", _R, _in_float32(f"{MLP}.0"), f"{MLP}.0: computed in float32"),
        (
            "linear map in bfloat16",
            _R,
            _in_float32(f"{MLP}.0", torch.bfloat16),
            f"{MLP}.0: computed in bfloat16",
        ),
        (
            "products of TF32 numbers",
            _R,
            _rounded_products(f"{MLP}.0", "tf32"),
            f"{MLP}.0: products of TF32 or float16 numbers",
        ),
        (
            "products of bfloat16 numbers",
            _R,
            _rounded_products(f"{MLP}.0", "bfloat16"),
            f"{MLP}.0: products of bfloat16 numbers",
        ),
        (
            "epsilon and GELU at once",
            _R,
            _both(_set(NORM, eps=1e-6), _replace(f"{MLP}.1", nn.GELU("tanh"))),
            (f"{MLP}.3: GELU by tanh", f"{NORM}: epsilon 1e-06"),
        ),
        (
            "epsilon and bias in one norm",
            _R,
            _set(NORM, eps=1e-3, bias=None),
            f"{NORM}: epsilon 0.001 instead of 1e-05 and bias dropped",
        ),
        ("final norm missing", _M, _replace("vit.norm", nn.Identity()), "vit.norm: norm left out"),
        (
            "features one block early",
            _M,
            _after("vit", _hidden_one_early),
            (
                "encoder4.transp_conv_init.conv: feature after block 9 instead of 10",
                "encoder3.transp_conv_init.conv: feature after block 6 instead of 7",
                "encoder2.transp_conv_init.conv: feature after block 3 instead of 4",
            ),
        ),
        (
            "InstanceNorm epsilon 1e-6",
            _M,
            _set("decoder4.conv_block.norm1", eps=1e-6),
            "decoder4.conv_block.norm1: epsilon 1e-06 instead of 1e-05",
        ),
        (
            "statistics over all channels",
            _M,
            _replace("decoder4.conv_block.norm1", nn.GroupNorm(1, 16, affine=False)),
            "decoder4.conv_block.norm1: group norm and statistics over all channels",
        ),
        (
            "LeakyReLU of slope 0.2",
            _M,
            _replace("decoder4.conv_block.lrelu", nn.LeakyReLU(0.2)),
            (
                "decoder4.conv_block.conv2.conv: LeakyReLU of slope 0.2 instead of 0.01",
                "decoder4.conv_block: LeakyReLU of slope 0.2 instead of 0.01",
            ),
        ),
        (
            "no shortcut",
            _M,
            _no_shortcut,
            (
                "decoder4.conv_block.conv3.conv: never calls",
                "decoder4.conv_block.norm3: never calls",
                "decoder4.conv_block: shortcut left out",
            ),
        ),
        (
            "concatenation in the other order",
            _M,
            _before("decoder3.conv_block", _halves),
            "decoder3.conv_block.conv1.conv: skip before the up-sampled features",
        ),
        (
            "patches flattened with channels first",
            _M,
            _replace(
                "vit.patch_embedding.patch_embeddings.0",
                Rearrange("b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=16, p2=16),
            ),
            "vit.patch_embedding.patch_embeddings.1: channels first",
        ),
        (
            "attention scaled by the embedding's width",
            _M,
            _set("vit.blocks.3.attn", scale=24**-0.5),
            "vit.blocks.3.attn.out_proj: attention scaled by the embedding's width",
        ),
        (
            "an own idea that nobody knows",
            _M,
            _after("vit.blocks.3.mlp.linear1", lambda y: y + 0.01 * y.roll(1, -1) ** 2),
            "vit.blocks.3.mlp.linear1: no known cause",
        ),
    )
)
