"""Twins: the two models of one configuration, with the same weights and the same input."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.parity.torch_models import load_weights, torch_model_of
from unetr_flax.weights import from_torch
from unetr_flax.weights.counters import BATCH_COUNTER


@dataclasses.dataclass(frozen=True)
class Twins:
    """Both models and one batch for them.

    Attributes:
      cfg: their configuration.
      dtype: "float32" or "float64", of parameters and computation.
      torch_model: the PyTorch original, in evaluation mode.
      model: the Flax model.
      variables: the Flax variables, converted from the PyTorch weights.
      image: [B, *img_size, in_channels].
      own: whether the PyTorch model is somebody's own instead of the original.
      prefix: prefix of the names that the family's modules have in it.
    """

    cfg: UNETRConfig
    dtype: str
    torch_model: torch.nn.Module
    model: UNETR
    variables: dict[str, Any]
    image: np.ndarray
    own: bool = False
    prefix: str = ""

    def astype(self, dtype: str) -> Self:
        """Copies the twins to another dtype, "float32" or "float64"."""
        return dataclasses.replace(
            self,
            dtype=dtype,
            torch_model=copy.deepcopy(self.torch_model).to(getattr(torch, dtype)),
            model=self.model.clone(param_dtype=jnp.dtype(dtype)),
            variables=jax.tree.map(lambda x: x.astype(dtype), self.variables),
            image=self.image.astype(dtype),
        )


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Fills parameters and running statistics with values that no layout error leaves as they are.

    Args:
      module: the module, changed in place.
      seed: seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            leaf = name.rpartition(".")[2]
            if leaf == BATCH_COUNTER:
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if leaf == "running_var":
                noise = 0.5 + noise.abs()
            elif value.ndim == 1 and leaf == "weight":
                noise = 1 + 0.2 * noise
            elif value.ndim > 1 and leaf == "weight":
                # Keeps activations of order one through all layers.
                noise = noise * (value[0].numel() ** -0.5)
            else:
                noise = 0.2 * noise
            value.copy_(noise)


def make_twins(
    cfg: UNETRConfig,
    dtype: str,
    *,
    batch: int = 2,
    seed: int = 0,
    state_dict: Mapping[str, Any] | None = None,
    image: np.ndarray | None = None,
    torch_model: torch.nn.Module | None = None,
    prefix: str = "",
) -> Twins:
    """Makes both models with random weights and statistics, or with those of a state dict.

    Args:
      cfg: the configuration.
      dtype: "float32" or "float64"; the latter needs `precise()`.
      batch: volumes in the batch.
      seed: seed of weights and image.
      state_dict: weights to use instead of random ones, as for `from_torch`.
      image: image to use instead of a random one, [B, *img_size, in_channels].
      torch_model: a model of somebody's own to compare with instead of the original, with the
        weights that it shall have.
      prefix: prefix of the names that the family's modules have in that model.
    """
    own = torch_model is not None
    torch_model = torch_model if own else torch_model_of(cfg)
    torch_model = torch_model.to(getattr(torch, dtype)).eval()
    random = state_dict is None
    if state_dict is None:
        randomize(torch_model, seed)
        state_dict = torch_model.state_dict()
    # The conversion comes before load_weights, because its errors say more.
    variables = from_torch(state_dict, cfg)
    if not (own or random):
        load_weights(torch_model, state_dict, cfg)
    if image is None:
        shape = (batch, *cfg.img_size, cfg.in_channels)
        image = np.random.default_rng(seed).standard_normal(shape)
    return Twins(
        cfg=cfg,
        dtype=dtype,
        torch_model=torch_model,
        model=UNETR(cfg, param_dtype=jnp.dtype(dtype)),
        variables=jax.tree.map(lambda x: x.astype(dtype), variables),
        image=image.astype(dtype),
        own=own,
        prefix=prefix,
    )


def named_modules(model: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the whole model as "", and the modules behind a prefix by their names without it."""
    yield "", model
    for name, module in model.named_modules():
        if name.startswith(prefix) and name != prefix:
            yield name.removeprefix(prefix), module


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Keeps float64 arrays float64, and float32 products in full float32 on every platform."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def channels_first(x: np.ndarray) -> np.ndarray:
    """Moves the channels: [B, *spatial, C] -> [B, C, *spatial]."""
    return np.moveaxis(np.asarray(x), -1, 1)


def channels_first_tensor(x: np.ndarray) -> torch.Tensor:
    """Copies a channels-last array [B, *spatial, C] to a tensor [B, C, *spatial]."""
    return torch.from_numpy(channels_first(x).copy())
