"""The two models of one configuration, with the same weights and the same input."""

import contextlib
import dataclasses
import fractions
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import unetr_torch_ref
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.weights import from_torch


@dataclasses.dataclass(frozen=True)
class Twins:
    """Both models and one batch for them.

    Attributes:
      cfg: their configuration.
      dtype: "float32" or "float64", of parameters and computation.
      torch_model: the PyTorch reference, in evaluation mode.
      model: the Flax model.
      variables: the Flax variables, converted from the PyTorch model.
      image: [B, *img_size, in_channels].
      labels: [B, *img_size], int32.
    """

    cfg: UNETRConfig
    dtype: str
    torch_model: torch.nn.Module
    model: UNETR
    variables: dict[str, Any]
    image: np.ndarray
    labels: np.ndarray


def torch_reference(cfg: UNETRConfig) -> unetr_torch_ref.UNETR:
    """The PyTorch reference model of a configuration."""
    return unetr_torch_ref.UNETR(
        img_shape=cfg.img_size,
        input_dim=cfg.in_channels,
        output_dim=cfg.out_channels,
        embed_dim=cfg.hidden_size,
        patch_size=cfg.patch_size,
        num_heads=cfg.num_heads,
        dropout=cfg.dropout_rate,
        # The exact divisor: a float could truncate to a width one below.
        light_r=fractions.Fraction(64, cfg.channels[1]),
        num_layers=cfg.num_layers,
        mlp_dim=cfg.mlp_dim,
        ext_layers=cfg.skip_layers,
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Gives every parameter and running statistic values that no layout error leaves alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            leaf = name.rpartition(".")[2]
            if leaf == "num_batches_tracked":
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
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Twins:
    """Both models with random weights and statistics, or with those of a state dict.

    Args:
      cfg: the configuration.
      dtype: "float32" or "float64"; the latter needs `precise()`.
      batch: volumes in the batch.
      seed: of weights, image and labels.
      state_dict: weights to use instead of random ones.
    """
    torch_model = torch_reference(cfg).to(getattr(torch, dtype)).eval()
    if state_dict is None:
        randomise(torch_model, seed)
    else:
        torch_model.load_state_dict(state_dict)
    rng = np.random.default_rng(seed)
    return Twins(
        cfg=cfg,
        dtype=dtype,
        torch_model=torch_model,
        model=UNETR(cfg, param_dtype=jnp.dtype(dtype)),
        variables=from_torch(torch_model.state_dict(), cfg),
        image=rng.standard_normal((batch, *cfg.img_size, cfg.in_channels)).astype(dtype),
        labels=rng.integers(0, cfg.out_channels, (batch, *cfg.img_size), dtype=np.int32),
    )


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """float64 where arrays are float64, and float32 products in full float32 on every platform."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def channels_first(x: np.ndarray) -> np.ndarray:
    """[B, *spatial, C] -> [B, C, *spatial]."""
    return np.moveaxis(np.asarray(x), -1, 1)


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """A channels-last array as PyTorch's channels-first tensor."""
    return torch.from_numpy(channels_first(x).copy())
