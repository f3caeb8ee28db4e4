"""Loading of a pretrained vision transformer into the encoder of a UNETR."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import einops
import numpy as np
from flax import traverse_util

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.convert import plain_tree, to_numpy
from unetr_flax.weights.encoders.refusals import check_mechanisms, check_sizes
from unetr_flax.weights.encoders.sources import SOURCES, EncoderSource
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families.shapes import Shapes, image_size
from unetr_flax.weights.layouts import Layout
from unetr_flax.weights.mapping import array_pairs, modules_of
from unetr_flax.weights.resize import resize_positions

EMBEDDING = ("params", "encoder", "embedding")
POSITIONS = (*EMBEDDING, "position_embedding")
STEM = (*EMBEDDING, "projection", "kernel")
FINAL_NORM = ("params", "encoder", "norm")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What became of the arrays in an encoder's file.

    Attributes:
      source: the project and model that the file is of.
      prefix: what stood before all keys.
      loaded: number of keys that were loaded; every array of the encoder got its values.
      skipped: keys that were not, those with the prefix without it.
      resized: changes of shape, in words.
      notes: what else differs from the source's encoder, in words.
    """

    source: str
    prefix: str
    loaded: int
    skipped: tuple[str, ...]
    resized: tuple[str, ...]
    notes: tuple[str, ...]

    def describe(self) -> str:
        """Describes the transfer in a few lines."""
        modules = (re.sub(r"\.(weight|bias)$", "", key) for key in self.skipped)
        groups = sorted({re.sub(r"\.\d+\.", ".*.", module) for module in modules})
        shown = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
        prefix = f", prefix {self.prefix!r} removed" if self.prefix else ""
        lines = [
            f"encoder from {self.source}{prefix}",
            f"  {self.loaded} keys loaded, {len(self.skipped)} skipped"
            + (f" ({shown})" if shown else "")
            + f", {len(self.resized)} resized",
            *(f"  {change}" for change in (*self.resized, *self.notes)),
        ]
        return "\n".join(lines)


def load_encoder(
    state_dict: Mapping[str, Any],
    cfg: UNETRConfig,
    variables: Mapping[str, Any],
    *,
    img_size: Sequence[int] | None = None,
) -> tuple[dict[str, Any], Transfer]:
    """Puts the weights of a pretrained vision transformer into the encoder of a UNETR.

    The features are then those of the source's encoder without its class token, if channels and
    window are the same. For other channels the stem is summed over the source's channels and
    shared equally among the model's, so that equal channels give what one gave. For other windows
    the positions are interpolated linearly. A family that scales attention differently gets
    queries that make up for it.

    Args:
      state_dict: arrays or tensors by key, of MONAI's ViT, ViTAutoEnc, MaskedAutoEncoderViT or
        UNETR, or of SelfMedMAE, behind any prefix.
      cfg: the model's configuration. Shapes do not tell the number of heads, so it counts.
      variables: the model's variables; their dtypes are kept.
      img_size: voxels per axis of the window that the encoder was trained with; needed if its
        number of patches is neither that of the model nor that of equal axes, or that of both.

    Returns:
      Variables whose encoder is new, every array of it, all other leaves the same objects, and
      what became of the keys.

    Raises:
      CheckpointError: if the keys are those of no known encoder, if an array is missing, of
        another shape or not finite, or if the encoder does what UNETR's cannot; the message names
        it.
    """
    source, prefix = _recognize(state_dict)
    given = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    shapes = Shapes({key: tuple(value.shape) for key, value in given.items()})
    table = source.table(shapes)
    pairs = array_pairs(modules_of(table, shapes.count(source.block)), table)
    check_mechanisms(source, given, {pair.torch_keys[0] for pair in pairs})
    check_sizes(shapes.count(source.block), shapes, table, cfg)
    if not cfg.family_spec.final_norm:
        pairs = [pair for pair in pairs if pair.flax_path[:3] != FINAL_NORM]
    resized: list[str] = []
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(plain_tree(variables))
    for path, leaf in leaves.items():
        if path[-2:] == ("qkv", "bias"):
            # A source without these biases computes as with zeros.
            leaves[path] = np.zeros(np.shape(leaf), leaf.dtype)
    for pair in pairs:
        (key,) = pair.torch_keys
        if key not in given:
            raise CheckpointError(f"encoder: {key} is missing")
        array = _in_flax_layout(key, to_numpy(given[key]), pair.layout, cfg)
        if broken := int((~np.isfinite(array)).sum()):
            raise CheckpointError(
                f"encoder: {key}: {broken} of {array.size} numbers are NaN or infinite"
            )
        if pair.flax_path == POSITIONS:
            array = _adapt_positions(array, cfg, img_size, source.class_row, resized)
        elif pair.flax_path == STEM:
            array = _adapt_stem(array, cfg.in_channels, resized)
        elif pair.flax_path[-2] == "qkv":
            array = _adapt_scale(array, cfg)
        leaf = leaves[pair.flax_path]
        if array.shape != np.shape(leaf):
            raise CheckpointError(
                f"encoder: {key} has shape {shapes[key]}, {array.shape} in the order of Flax; the "
                f"model has {np.shape(leaf)}"
            )
        leaves[pair.flax_path] = array.astype(leaf.dtype)
    loaded = {pair.torch_keys[0] for pair in pairs}
    transfer = Transfer(
        source=source.name,
        prefix=prefix,
        loaded=len(loaded),
        skipped=tuple(
            name for key in state_dict if (name := key.removeprefix(prefix)) not in loaded
        ),
        resized=tuple(resized),
        notes=_notes(source, given, cfg),
    )
    return traverse_util.unflatten_dict(leaves), transfer


def _recognize(keys: Iterable[str]) -> tuple[EncoderSource, str]:
    """Finds the source of a file, and the prefix of its keys."""
    keys = list(keys)
    found = {
        (source.name, match[1]): source
        for source in SOURCES
        for key in keys
        if (match := re.fullmatch(rf"((?:.*\.)?){re.escape(source.anchor)}", key))
    }
    if not found:
        anchors = ", ".join(f"{source.anchor} ({source.name})" for source in SOURCES)
        raise CheckpointError(
            f"encoder: no pretrained encoder that is known; must have {anchors}, its keys are "
            f"like {', '.join(keys[:3])}"
        )
    if len(found) > 1:
        prefixes = " and ".join(repr(prefix) for _, prefix in found)
        raise CheckpointError(f"encoder: there are encoders behind {prefixes}, there must be one")
    (((_, prefix), source),) = found.items()
    return source, prefix


def _in_flax_layout(key: str, array: np.ndarray, layout: Layout, cfg: UNETRConfig) -> np.ndarray:
    patch = {f"p{axis}": size for axis, size in enumerate(cfg.patch_size)}
    try:
        return layout.to_flax(array, h=cfg.num_heads, qkv=3, **patch)
    except einops.EinopsError:
        raise CheckpointError(
            f"encoder: {key} has shape {array.shape}, which does not fit {cfg.num_heads} heads and "
            f"patches of {' x '.join(map(str, cfg.patch_size))}"
        ) from None


def _adapt_positions(
    positions: np.ndarray,
    cfg: UNETRConfig,
    img_size: Sequence[int] | None,
    class_row: bool,
    resized: list[str],
) -> np.ndarray:
    """Takes off the row of a class token, if any, and interpolates to the model's patches."""
    if positions.ndim != 3:
        raise CheckpointError(
            f"encoder: positions have shape {positions.shape}, must have 3 axes, as in [1, N, E]"
        )
    tokens = positions.shape[1]
    counts = (tokens, tokens - 1) if class_row else (tokens,)
    if img_size is not None:
        _check_window(img_size, cfg)
    elif cfg.num_patches in counts:
        _check_one_window(cfg)
        img_size = cfg.img_size
    for count in counts:
        try:
            window = image_size(img_size, cfg.patch_size, count)
        except CheckpointError:
            continue
        grid = tuple(n // p for n, p in zip(window, cfg.patch_size, strict=True))
        if math.prod(grid) != count:
            continue
        if count < tokens:
            resized.append("row of the class token taken off the positions")
        positions = positions[:, tokens - count :]
        if grid != cfg.grid_size:
            sizes = (" x ".join(map(str, each)) for each in (grid, cfg.grid_size))
            resized.append("positions interpolated from {} to {} patches".format(*sizes))
            positions = resize_positions(positions, grid, cfg.grid_size)
        return positions
    given = "the number of patches does not tell it" if img_size is None else f"not {img_size}"
    raise CheckpointError(f"img_size: must be the encoder's window, of {tokens} patches ({given})")


def _check_window(img_size: Sequence[int], cfg: UNETRConfig) -> None:
    """Raises if a window is not made of the model's patches."""
    patch = cfg.patch_size
    fits = len(img_size) == len(patch) and all(
        n > 0 and n % p == 0 for n, p in zip(img_size, patch, strict=True)
    )
    if not fits:
        given, sizes = (" ".join(map(str, each)) for each in (img_size, patch))
        raise CheckpointError(
            f"img_size: must be {len(patch)} positive multiples of the patch {sizes} (not {given})"
        )


def _check_one_window(cfg: UNETRConfig) -> None:
    """Raises if as many patches as the model's may also be those of equal axes."""
    grid = cfg.grid_size
    edge = round(cfg.num_patches ** (1 / len(grid)))
    if edge ** len(grid) == cfg.num_patches and set(grid) != {edge}:
        sizes = (" x ".join(map(str, each)) for each in ((edge,) * len(grid), grid))
        raise CheckpointError(
            "img_size: must be given, since the encoder's {} patches may be {} or {}".format(
                cfg.num_patches, *sizes
            )
        )


def _adapt_stem(kernel: np.ndarray, in_channels: int, resized: list[str]) -> np.ndarray:
    """Shares the sum over the source's channels equally among the model's."""
    channels = kernel.shape[-2]
    if channels == in_channels:
        return kernel
    resized.append(f"stem of {channels} channels shared equally among {in_channels}")
    mean = kernel.sum(-2, keepdims=True) / in_channels
    return np.repeat(mean, in_channels, axis=-2)


def _adapt_scale(qkv: np.ndarray, cfg: UNETRConfig) -> np.ndarray:
    """Scales queries [..., 3, H, D] so that energies are those of 1 / sqrt(D)."""
    factor = 1 / math.sqrt(cfg.head_dim) / cfg.attention_scale
    if factor == 1:
        return qkv
    qkv = qkv.astype(np.float64)
    qkv[..., 0, :, :] *= factor
    return qkv


def _notes(source: EncoderSource, given: Mapping[str, Any], cfg: UNETRConfig) -> tuple[str, ...]:
    notes = []
    if source.class_token in given:
        notes.append("class token left out")
    spec = cfg.family_spec
    if source.epsilon != spec.layer_norm_epsilon:
        notes.append(
            f"norms add {spec.layer_norm_epsilon:g} to variances, in the source {source.epsilon:g}"
        )
    if not spec.final_norm:
        notes.append(f"last norm left out, family {cfg.family!r} has none")
    if not spec.scale_by_head:
        notes.append(f"queries scaled, since family {cfg.family!r} divides energies by more")
    return tuple(notes)
