"""State dicts of PyTorch to variables of Flax, and back, bit for bit."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from unetr_flax.config import UNETRConfig
from unetr_flax.unetr import UNETR
from unetr_flax.weights.mapping import IGNORED_SUFFIX, array_pairs, module_pairs


class WeightsError(ValueError):
    """Weights that do not fit the model; the message lists all that is wrong."""


def from_torch(state_dict: Mapping[str, Any], cfg: UNETRConfig) -> dict[str, Any]:
    """Flax variables from the state dict of a `unetr_torch_ref.UNETR` of the same sizes.

    Args:
      state_dict: PyTorch tensors or numpy arrays by key. `num_batches_tracked` is ignored.
      cfg: the model's configuration.

    Returns:
      {"params": ..., "batch_stats": ...} of new numpy arrays, dtypes kept.

    Raises:
      WeightsError: naming every key that is missing, unexpected or of another shape.
    """
    pairs = array_pairs(module_pairs(cfg))
    shapes = _torch_shapes(cfg)
    given = {k: v for k, v in state_dict.items() if k.rpartition(".")[2] != IGNORED_SUFFIX}
    _check({key: tuple(value.shape) for key, value in given.items()}, shapes, "state dict")
    flat = {
        pair.flax_path: pair.layout.to_flax(_numpy(given[pair.torch_key]), **_sizes(cfg))
        for pair in pairs
    }
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], cfg: UNETRConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, as a state dict of numpy arrays.

    A tree of gradients {"params": grads} is mapped to PyTorch's names and layouts likewise: without
    "batch_stats" the result has no running statistics.

    Args:
      variables: Flax variables or {"params": gradients}, jax or numpy arrays.
      cfg: the model's configuration.

    Raises:
      WeightsError: naming every leaf that is missing, unexpected or of another shape.
    """
    given = traverse_util.flatten_dict(_plain(variables))
    expected = {
        path: shape
        for path, shape in _flax_shapes(cfg).items()
        if path[0] == "params" or path[0] in variables
    }
    _check(
        {"/".join(path): tuple(np.shape(leaf)) for path, leaf in given.items()},
        {"/".join(path): shape for path, shape in expected.items()},
        "variables",
    )
    return {
        pair.torch_key: pair.layout.to_torch(np.asarray(given[pair.flax_path]), **_sizes(cfg))
        for pair in array_pairs(module_pairs(cfg))
        if pair.flax_path in expected
    }


def _sizes(cfg: UNETRConfig) -> dict[str, int]:
    return {"h": cfg.num_heads, "qkv": 3}


def _flax_shapes(cfg: UNETRConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every leaf of the model's variables, from the model itself."""
    x = jax.ShapeDtypeStruct((1, *cfg.img_size, cfg.in_channels), jnp.float32)
    variables = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), x)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables).items()}


def _torch_shapes(cfg: UNETRConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every key of the state dict."""
    shapes = _flax_shapes(cfg)
    return {
        pair.torch_key: pair.layout.to_torch(
            np.broadcast_to(np.int8(0), shapes[pair.flax_path]), **_sizes(cfg)
        ).shape
        for pair in array_pairs(module_pairs(cfg))
    }


def _check(given: Mapping[str, tuple], expected: Mapping[str, tuple], what: str) -> None:
    """Raises one error for everything in which the keys and shapes differ."""
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


def _plain(tree: Any) -> Any:
    """Nested mappings of any class as dicts."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree


def _numpy(value: Any) -> np.ndarray:
    """A numpy array of a tensor or an array, in its own dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        # numpy has no bfloat16 of its own; every bfloat16 is exactly a float32.
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
