"""Places of the comparison on equal inputs: modules by Flax path, and their arrays' layouts.

All arrays are brought to one form: tokens [B, N, E], grids [B, C, *spatial], queries, keys and
values [B, N, qkv, h, d], and the joined heads [B, N, (h d)].
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import einops
import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import NUM_STAGES
from unetr_flax.parity.twins import channels_first
from unetr_flax.weights.families import family_of
from unetr_flax.weights.mapping import module_pairs

# Kinds of modules that are compared alone, on the other side's inputs.
LEAVES = (
    "conv",
    "fuse_conv",
    "conv_embedding",
    "perceptron_embedding",
    "deconv",
    "batch_norm",
    "channel_norm",
    "norm",
    "linear",
    "qkv",
    "projection",
)
# Kinds of blocks whose own part, beside the modules in them, is an activation or a sum.
BLOCKS = (
    "conv_block",
    "deconv_block",
    "unet_block",
    "fitted_block",
    "fuse_block",
    "fitted_fuse_block",
)
# Numbers in one feature map of full resolution from which a model's parts are compared alone.
LARGE = 2**22
LAST_PART = f"decoder/stage_{NUM_STAGES - 1}"
ALL_PARTS = frozenset(["encoder", *(f"decoder/stage_{i}" for i in range(NUM_STAGES))])
EMBEDDING = "encoder/embedding/projection"


@dataclasses.dataclass(frozen=True)
class Place:
    """A module that both models have.

    Attributes:
      path: its path in the Flax model, joined by "/".
      torch: its name in the PyTorch model; three names for separate queries, keys and values.
      kind: its kind, as in the table of names.
    """

    path: str
    torch: tuple[str, ...]
    kind: str

    @property
    def name(self) -> str:
        """Its PyTorch name for reports."""
        if len(self.torch) == 1:
            return self.torch[0]
        return self.torch[0].rpartition(".")[0] + ".qkv"


def find_places(cfg: UNETRConfig) -> tuple[dict[str, Place], dict[str, Place]]:
    """Returns the modules that are compared alone, and the decoder's blocks, both by path."""
    leaves, blocks = {}, {}
    qkv = family_of(cfg).torch_model.qkv
    for pair in module_pairs(cfg):
        place = Place("/".join(pair.flax_path), (pair.torch_name,), pair.kind)
        if pair.kind in LEAVES:
            leaves[place.path] = place
        elif pair.kind in BLOCKS:
            blocks[place.path] = place
        elif pair.kind == "attention" and not isinstance(qkv, str):
            names = tuple(f"{pair.torch_name}.{name}" for name in qkv)
            leaves[f"{place.path}/qkv"] = Place(f"{place.path}/qkv", names, "qkv")
    return leaves, blocks


def parts_of(cfg: UNETRConfig, batch: int) -> list[frozenset[str]]:
    """Returns the parts of a model that are compared one after the other, to bound the memory.

    Args:
      cfg: the configuration.
      batch: images in the batch.

    Returns:
      The encoder, "encoder", and the decoder's stages, "decoder/stage_0" and so on with the head in
      the last one, each alone; or all of them at once if the model is small.
    """
    largest = batch * math.prod(cfg.img_size) * cfg.channels[0]
    if largest < LARGE:
        return [ALL_PARTS]
    return [frozenset([part]) for part in sorted(ALL_PARTS, reverse=True)]


def part_of(path: str) -> str:
    """Returns the part that a place is in."""
    if path.startswith("encoder/"):
        return "encoder"
    if path == "decoder/head":
        return LAST_PART
    return "/".join(path.split("/")[:2])


def belongs(path: str, parts: frozenset[str]) -> bool:
    """Returns whether a place is needed for the comparison of some parts.

    The encoder's tokens are small and feed all stages; a stage needs the end of the one before.
    """
    part = part_of(path)
    if part in parts or part == "encoder":
        return True
    stage, number = part[:-1], int(part[-1])
    return f"{stage}{number + 1}" in parts and path.split("/")[2].startswith("fuse_")


def weights_of(place: Place, state: Mapping[str, np.ndarray], cfg: UNETRConfig) -> dict[str, Any]:
    """Returns a module's weights by the names that its definition has for them."""
    weight, bias = "weight", "bias"
    found: dict[str, Any] = {}
    for key in (weight, bias):
        parts = [state[f"{name}.{key}"] for name in place.torch if f"{name}.{key}" in state]
        if parts:
            found[key] = np.concatenate(parts)
    if place.kind in ("norm", "batch_norm", "channel_norm"):
        if weight in found:
            found["scale"] = found.pop(weight)
        for key, name in (("running_mean", "mean"), ("running_var", "var")):
            if f"{place.torch[0]}.{key}" in state:
                found[name] = state[f"{place.torch[0]}.{key}"]
    if place.kind == "perceptron_embedding":
        axes = " ".join(f"p{axis}" for axis in range(cfg.spatial_rank))
        sizes = {f"p{axis}": size for axis, size in enumerate(cfg.patch_size)}
        found[weight] = einops.rearrange(found[weight], f"o ({axes} i) -> o i {axes}", **sizes)
    return found


def qkv_order(cfg: UNETRConfig) -> str:
    """Returns the order of the features of queries, keys and values, such as "(h d qkv)"."""
    order = family_of(cfg).torch_model.qkv
    return order if isinstance(order, str) else "(qkv h d)"


def from_flax(x: Any, kind: str, cfg: UNETRConfig, *, output: bool) -> np.ndarray:
    """Brings the input or output of a Flax module to the common form."""
    x = np.asarray(x)
    if kind in ("norm", "linear"):
        return x
    if kind == "qkv":
        return x
    if kind == "projection":
        return x if output else einops.rearrange(x, "b n h d -> b n (h d)")
    if kind == "fuse_conv" and not output:
        x = np.roll(x, x.shape[-1] // 2, axis=-1)
    return channels_first(x)


def to_flax(x: np.ndarray, kind: str, cfg: UNETRConfig, *, output: bool) -> np.ndarray:
    """Brings an array of the common form to the layout of a Flax module, as `from_flax` undoes."""
    if kind in ("norm", "linear", "qkv"):
        return x
    if kind == "projection":
        if output:
            return x
        return einops.rearrange(x, "b n (h d) -> b n h d", h=cfg.num_heads)
    x = np.moveaxis(x, 1, -1)
    if kind == "fuse_conv" and not output:
        x = np.roll(x, x.shape[-1] // 2, axis=-1)
    return x


def from_torch_output(arrays: list[np.ndarray], place: Place, cfg: UNETRConfig) -> np.ndarray:
    """Brings the output of a PyTorch module, or of three, to the common form."""
    if place.kind == "qkv":
        flat = np.concatenate(arrays, -1)
        return einops.rearrange(
            flat, f"b n {qkv_order(cfg)} -> b n qkv h d", h=cfg.num_heads, qkv=3
        )
    (x,) = arrays
    if place.kind == "perceptron_embedding":
        return np.moveaxis(x.reshape(len(x), *cfg.grid_size, -1), -1, 1)
    return x
