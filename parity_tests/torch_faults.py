"""How mistakes are planted in PyTorch models: modules that are replaced, hooked or rewritten."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def set_forward(module: nn.Module, forward: Callable) -> None:
    """Replaces what one module computes."""
    module.forward = types.MethodType(forward, module)


def set_attributes(path: str, **values: Any) -> Callable[[Any], None]:
    """Sets attributes of a submodule."""

    def plant(model):
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return plant


def replace_module(path: str, new: nn.Module) -> Callable[[Any], None]:
    """Replaces a submodule."""
    parent, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(parent), name, new)


def change_weight(
    path: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Any], None]:
    """Changes the weight of a submodule."""

    def plant(model):
        weight = model.get_submodule(path).weight
        weight.data = change(weight.data).contiguous()

    return plant


def change_input(
    path: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Any], None]:
    """Changes what a submodule is given."""
    return lambda model: model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: (change(args[0]), *args[1:])
    )


def change_output(path: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Changes what a submodule returns."""
    return lambda model: model.get_submodule(path).register_forward_hook(
        lambda module, args, output: change(output)
    )


def both(*plants: Callable[[Any], None]) -> Callable[[Any], None]:
    def plant(model):
        for one in plants:
            one(model)

    return plant


def in_training(path: str, rate: float | None = None) -> Callable[[Any], None]:
    """Leaves the training mode of a submodule on."""

    def plant(model):
        module = model.get_submodule(path)
        if rate is not None:
            module.p = rate
        module.train()

    return plant


ATTENTION = "transformer.layers.1.0.fn"


def change_attention(
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

    return lambda model: set_forward(model.get_submodule(ATTENTION), forward)


def change_blocks(step: Callable) -> Callable[[Any], None]:
    """Replaces what the reference's transformer does in each block."""

    def forward(self, x, mask=None):
        extracted = []
        for number, layer in enumerate(self.layers, start=1):
            x = step(x, *layer.children(), number)
            if number in self.extract_layers:
                extracted.append(x)
        return extracted

    return lambda model: set_forward(model.transformer, forward)


def post_norm(x, attention, mlp, number):
    x = attention.norm(x + attention.fn(x))
    return mlp.norm(x + mlp.fn(x))


def no_residual(x, attention, mlp, number):
    x = attention(x) if number == 2 else attention(x) + x
    return mlp(x) + x


def change_embedding(
    add: Callable, flatten: str = "b e h w d -> b (h w d) e"
) -> Callable[[Any], None]:
    """Replaces the reference's sum of patches and positions."""

    def forward(self, x):
        x = rearrange(self.patch_embeddings(x), flatten)
        return self.dropout(add(x, self.position_embeddings, self.patch_dim))

    return lambda model: set_forward(model.embedding, forward)


def transposed_positions(x, position, grid):
    h, w, d = grid
    return x + rearrange(position, "b (h w d) e -> b (d w h) e", h=h, w=w, d=d)


def misread_positions(x, position, grid):
    h, w, d = grid
    return x + rearrange(position, "b (d w h) e -> b (h w d) e", h=h, w=w, d=d)


def interpolated(mode: str) -> Callable[[Any], None]:
    def forward(self, x):
        strides = tuple(map(float, self.weight.shape[2:]))
        y = F.interpolate(x, scale_factor=strides, mode=mode)
        mixed = torch.einsum("bi...,io->bo...", y, self.weight.mean((2, 3, 4)))
        return mixed + self.bias.reshape(1, -1, 1, 1, 1)

    return lambda model: set_forward(model.get_submodule("decoder6.1.block.0.block"), forward)


class FastGELU(nn.Module):
    """GELU by a sigmoid."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def in_narrow_format(path: str, dtype: torch.dtype = torch.float32) -> Callable[[Any], None]:
    """Computes a linear map in a shorter format."""

    def forward(self, x):
        bias = self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    return lambda model: set_forward(model.get_submodule(path), forward)


def round_products(path: str, precision: str) -> Callable[[Any], None]:
    """Rounds the operands of a linear map, as fast units of processors do."""

    def rounded(x):
        if precision == "bfloat16":
            return x.bfloat16().to(x.dtype)
        mantissa, exponent = torch.frexp(x.float())
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11).to(x.dtype)

    def forward(self, x):
        return F.linear(rounded(x), rounded(self.weight), self.bias)

    return lambda model: set_forward(model.get_submodule(path), forward)


def hidden_one_early(output):
    last, hidden = output
    return last, [hidden[0], *hidden[:-1]]


def no_shortcut(model):
    def forward(self, x):
        y = self.lrelu(self.norm1(self.conv1(x)))
        return self.lrelu(self.norm2(self.conv2(y)))

    set_forward(model.decoder4.conv_block, forward)


def halves(x):
    return torch.roll(x, x.shape[1] // 2, 1)
