"""Errors that ports of this kind really make, to be planted on the Flax side.

Each error is a context manager. While it is entered one thing is wrong, and the parity ladder must
fail by a wide margin.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import optax

from parity_tests import trajectory
from unetr_flax import ops
from unetr_flax.model import blocks, decoder, encoder, norms, unetr
from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights import layouts
from unetr_flax.weights.layouts import Layout


@dataclasses.dataclass(frozen=True)
class PlantedError:
    """One mistake.

    Attributes:
      name: the error in words.
      rung: the rung that must notice: "activations", "masked activations", "training" or
        "trajectory".
      plant: makes the context manager that plants the error.
    """

    name: str
    rung: str
    plant: Callable[[], contextlib.AbstractContextManager]


# Width of the tokens in `configs.SMALL`.
HIDDEN_SIZE = 24

# The original functions and modules, which stand-ins call while they replace them.
_DECODER, _ENCODER = decoder.Decoder, encoder.VisionTransformer
_ATTENTION, _PATCH_EMBEDDING = encoder.MultiHeadAttention, encoder.PatchEmbedding
_CONCATENATE = ops.concatenate
_GELU = nn.gelu


def _layout(layout: Layout, **changes: Any):
    # The dataclass is frozen, so its fields are changed in its dictionary.
    return lambda: mock.patch.dict(vars(layout), changes)


def _replace(owner: Any, name: str, value: Any):
    return lambda: mock.patch.object(owner, name, value)


def _fields(module: type[nn.Module], **changes: Any):
    """Changes fields of a linen module wherever one is made."""
    original = module.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **{**kwargs, **changes})

    return _replace(module, "__init__", init)


def _both(first: Callable, second: Callable):
    @contextlib.contextmanager
    def plant():
        with first(), second():
            yield

    return plant


def _flax_batch_norm(**options: Any):
    """Makes a stand-in for `blocks.BatchNorm`: Flax's own with PyTorch's epsilon and momentum."""

    class FlaxBatchNorm(nn.Module):
        negative_slope: float
        lowering: ops.Lowering
        dtype: Any = None
        param_dtype: Any = None

        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            settings = {"use_running_average": not train, "momentum": 0.9, "epsilon": 1e-5}
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            norm = nn.BatchNorm(**{**settings, **options}, **types)
            nn.share_scope(self, norm)
            return nn.leaky_relu(norm(x), self.negative_slope)

    return FlaxBatchNorm


def _transposed_tokens(config: UNETRConfig, **options: Any):
    def apply(image: jax.Array, train: bool) -> jax.Array:
        tokens = _PATCH_EMBEDDING(config, **options)(image, train=train)
        grid = tokens.reshape(tokens.shape[0], *config.grid_size, config.hidden_size)
        return grid.swapaxes(1, 2).reshape(tokens.shape)

    return apply


def _decoder_with(change: Callable[[tuple], tuple]):
    """Makes a stand-in for the decoder that changes its skip features."""

    def make(config: UNETRConfig, **options: Any):
        def apply(image: jax.Array, skips: tuple, train: bool) -> jax.Array:
            return _DECODER(config, **options)(image, change(skips), train=train)

        return apply

    return make


def _attention_with(change: Callable[[jax.Array | None], jax.Array | None]):
    """Makes a stand-in for attention that changes its mask."""

    def make(config: UNETRConfig, **options: Any):
        def apply(x: jax.Array, mask: jax.Array | None, **how: bool):
            return _ATTENTION(config, **options)(x, change(mask), **how)

        return apply

    return make


def _earlier_skips(config: UNETRConfig, **options: Any):
    layers = (*config.skip_layers[:-1], config.skip_layers[-1] - 1)
    return _ENCODER(dataclasses.replace(config, skip_layers=layers), **options)


def _final_norm(skips: tuple) -> tuple:
    return (*skips[:-1], nn.LayerNorm(use_scale=False, use_bias=False)(skips[-1]))


def _softmax_before_scale(scaled: jax.Array, axis: int) -> jax.Array:
    # Undoes the scaling of the energies and scales the weights instead.
    scale = HIDDEN_SIZE**-0.5
    return jax.nn.softmax(scaled / scale, axis=axis) * scale


def _up_before_skip(parts: Sequence[jax.Array]) -> jax.Array:
    return _CONCATENATE(parts[::-1])


def _coupled_adamw(
    learning_rate: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, eps=eps))


PLANTED_ERRORS = tuple(
    PlantedError(*row)
    for row in (
        ("deconvolution kernel not flipped", "activations", _layout(layouts.DECONV, flip=False)),
        (
            "convolution kernel with two spatial axes exchanged",
            "activations",
            _layout(layouts.CONV, torch="o i x y z", flax="y x z i o"),
        ),
        (
            "qkv split as (qkv h d)",
            "activations",
            _both(
                _layout(layouts.QKV_WEIGHT, torch="(qkv h d) e"),
                _layout(layouts.QKV_BIAS, torch="(qkv h d)"),
            ),
        ),
        (
            "qkv split as (d h qkv)",
            "activations",
            _both(
                _layout(layouts.QKV_WEIGHT, torch="(d h qkv) e"),
                _layout(layouts.QKV_BIAS, torch="(d h qkv)"),
            ),
        ),
        (
            "heads joined as (d h)",
            "activations",
            _layout(layouts.PROJECTION, torch="e (d h)"),
        ),
        (
            "attention scaled by the head's size",
            "activations",
            _replace(UNETRConfig, "attention_scale", property(lambda cfg: cfg.head_dim**-0.5)),
        ),
        (
            "attention scaled after the softmax",
            "activations",
            _replace(nn, "softmax", _softmax_before_scale),
        ),
        (
            "GELU by tanh",
            "activations",
            _replace(nn, "gelu", lambda x, approximate: _GELU(x, approximate=True)),
        ),
        ("LayerNorm epsilon 1e-6", "activations", _fields(nn.LayerNorm, epsilon=1e-6)),
        ("BatchNorm epsilon 1e-6", "activations", _fields(norms.BatchNorm, epsilon=1e-6)),
        ("ReLU leaks", "activations", _replace(nn, "relu", nn.leaky_relu)),
        (
            "patches in another order",
            "activations",
            _replace(encoder, "PatchEmbedding", _transposed_tokens),
        ),
        (
            "skip features in reverse order",
            "activations",
            _replace(unetr, "Decoder", _decoder_with(lambda z: (*z[2::-1], z[3]))),
        ),
        (
            "last skip feature one block early",
            "activations",
            _replace(unetr, "VisionTransformer", _earlier_skips),
        ),
        (
            "norm after the last block",
            "activations",
            _replace(unetr, "Decoder", _decoder_with(_final_norm)),
        ),
        (
            "concatenated in the other order",
            "activations",
            _replace(ops, "concatenate", _up_before_skip),
        ),
        (
            "mask ignored",
            "masked activations",
            _replace(encoder, "MultiHeadAttention", _attention_with(lambda mask: None)),
        ),
        (
            "mask inverted",
            "masked activations",
            _replace(
                encoder,
                "MultiHeadAttention",
                _attention_with(lambda mask: None if mask is None else ~mask),
            ),
        ),
        (
            "running variance biased",
            "training",
            _replace(blocks, "BatchNorm", _flax_batch_norm(use_fast_variance=False)),
        ),
        ("BatchNorm momentum 0.01", "training", _fields(norms.BatchNorm, momentum=0.01)),
        (
            "running statistics used in training",
            "training",
            _replace(blocks, "BatchNorm", _flax_batch_norm(use_running_average=True)),
        ),
        (
            "weight decay through Adam's moments",
            "trajectory",
            _replace(trajectory.optax, "adamw", _coupled_adamw),
        ),
    )
)
