"""Conversion of PyTorch state dicts to Flax variables and back, bit for bit."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from unetr_flax.model.abstract import abstract_variables
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.weights.errors import WeightsError
from unetr_flax.weights.mapping import ArrayPair, array_pairs, module_pairs, table_of
from unetr_flax.weights.recognize import recognize
from unetr_flax.weights.unused_keys import known_unused
from unetr_flax.weights.unwrap import unwrap

logger = logging.getLogger(__name__)


def from_torch(state_dict: Mapping[str, Any], cfg: UNETRConfig) -> dict[str, Any]:
    """Converts the state dict of a PyTorch model of any family and version to Flax variables.

    Args:
      state_dict: PyTorch tensors or numpy arrays by key, or a checkpoint that holds such a state
        dict, its keys with or without the prefixes of wrappers (`unwrap`). Keys that no version of
        the model applies are dropped, and logged.
      cfg: the model's configuration, of the family that the keys belong to.

    Returns:
      {"params": ..., "batch_stats": ...} of new numpy arrays, dtypes kept; "batch_stats" only if
      the model has any.

    Raises:
      WeightsError: naming every key that is missing, unexpected or of another shape.
      CheckpointError: if there is no state dict, or it is no UNETR's that is known.
    """
    state_dict, _ = unwrap(state_dict)
    if (family := recognize(state_dict)).name != cfg.family:
        raise WeightsError(f"state dict: is of family {family.name!r}, the model of {cfg.family!r}")
    given, dropped = drop_unused(state_dict, cfg)
    if dropped:
        logger.info("%d keys that the model never applies dropped: %s", len(dropped), dropped)
    shapes = _torch_shapes(cfg)
    check_fit({key: tuple(value.shape) for key, value in given.items()}, shapes, "state dict")
    flat = {
        pair.flax_path: pair.layout.to_flax(
            _stack([to_numpy(given[key]) for key in pair.torch_keys]), **_sizes(cfg)
        )
        for pair in _pairs(cfg)
    }
    return traverse_util.unflatten_dict(flat)


def drop_unused(
    state_dict: Mapping[str, Any], cfg: UNETRConfig
) -> tuple[dict[str, Any], list[str]]:
    """Drops the keys that no version of the model applies.

    Args:
      state_dict: a bare state dict.
      cfg: the model's configuration.

    Returns:
      The state dict without those keys, and the keys.
    """
    needed = {key for pair in _pairs(cfg) for key in pair.torch_keys}
    unused = known_unused(cfg) - needed
    dropped = [key for key in state_dict if key in unused]
    return {key: state_dict[key] for key in state_dict if key not in unused}, dropped


def to_torch(variables: Mapping[str, Any], cfg: UNETRConfig) -> dict[str, np.ndarray]:
    """Converts Flax variables to a PyTorch state dict, the inverse of `from_torch`.

    A tree of gradients {"params": gradients} is converted likewise; without "batch_stats" the
    result has no running statistics.

    Args:
      variables: Flax variables or {"params": gradients}, jax or numpy arrays.
      cfg: the model's configuration.

    Returns:
      Numpy arrays by key, dtypes kept.

    Raises:
      WeightsError: naming every leaf that is missing, unexpected or of another shape.
    """
    given: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(plain_tree(variables))
    expected = {
        path: shape
        for path, shape in flax_shapes(cfg).items()
        if path[0] == "params" or path[0] in variables
    }
    check_fit(
        {"/".join(path): tuple(np.shape(leaf)) for path, leaf in given.items()},
        {"/".join(path): shape for path, shape in expected.items()},
        "variables",
    )
    state_dict = {}
    for pair in _pairs(cfg):
        if pair.flax_path in expected:
            array = pair.layout.to_torch(np.asarray(given[pair.flax_path]), **_sizes(cfg))
            state_dict |= _unstack(array, pair)
    return state_dict


def _pairs(cfg: UNETRConfig) -> list[ArrayPair]:
    return array_pairs(module_pairs(cfg), table_of(cfg))


def _sizes(cfg: UNETRConfig) -> dict[str, int]:
    patch = {f"p{axis}": size for axis, size in enumerate(cfg.patch_size)}
    return {"h": cfg.num_heads, "qkv": 3, **patch}


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)


def _unstack(array: np.ndarray, pair: ArrayPair) -> dict[str, np.ndarray]:
    if len(pair.torch_keys) == 1:
        return {pair.torch_keys[0]: array}
    return {key: np.array(part) for key, part in zip(pair.torch_keys, array, strict=True)}


@functools.cache
def flax_shapes(cfg: UNETRConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every leaf of the model's variables by path."""
    # Traced once for all blocks, by the plain definitions: a quarter of the time.
    model = UNETR(cfg, lowering="xla", jit_blocks=True)
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(abstract_variables(model))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _torch_shapes(cfg: UNETRConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every key of the state dict."""
    shapes = flax_shapes(cfg)
    torch_shapes = {}
    for pair in _pairs(cfg):
        # A view of one number has the shape of the real array without its memory.
        array = np.broadcast_to(np.int8(0), shapes[pair.flax_path])
        array = pair.layout.to_torch(array, **_sizes(cfg))
        torch_shapes |= {key: part.shape for key, part in _unstack(array, pair).items()}
    return torch_shapes


def check_fit(given: Mapping[str, tuple], expected: Mapping[str, tuple], what: str) -> None:
    """Compares keys and shapes.

    Args:
      given: the shapes that are there.
      expected: the shapes that the model has.
      what: their name, for the message.

    Raises:
      WeightsError: naming every key that is missing, unexpected or of another shape.
    """
    problems = [f"missing: {key} {expected[key]}" for key in expected if key not in given]
    problems += [f"unexpected: {key} {given[key]}" for key in given if key not in expected]
    problems += [
        f"shape: {key} is {given[key]}, must be {expected[key]}"
        for key in expected
        if key in given and given[key] != expected[key]
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise WeightsError(f"{what}: {len(problems)} keys do not fit the model\n  {lines}")


def plain_tree(tree: Any) -> Any:
    """Returns nested mappings of any class as dicts."""
    if isinstance(tree, Mapping):
        return {str(key): plain_tree(value) for key, value in tree.items()}
    return tree


def to_numpy(value: Any) -> np.ndarray:
    """Returns a tensor or an array as a numpy array of its own dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        # Tensors of bfloat16 have no numpy(); every bfloat16 is exactly a float32.
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
