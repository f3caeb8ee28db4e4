import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.ops.conv import conv
from unetr_flax.ops.conv3x3x3 import xla
from unetr_flax.ops.conv3x3x3.cpu_winograd import CHANNELS
from unetr_flax.ops.features import DeferredUpsample
from unetr_flax.ops.platform import target_platform
from unetr_flax.ops.testing import random


def ours(x, kernel, bias=None):
    return jax.jit(lambda *given: conv(*given, (1, 1, 1), "SAME", None))(x, kernel, bias)


def definition(x, kernel):
    return xla.convolve(x, kernel, None)


@pytest.mark.parametrize("depth", [2, 6, 7])
@pytest.mark.parametrize(("inputs", "features"), [(CHANNELS, CHANNELS), (40, 33), (33, 40)])
def test_it_is_the_convolution(depth, inputs, features):
    with jax.enable_x64(True):
        x, kernel = random(0, (2, depth, 5, 4, inputs)), random(1, (3, 3, 3, inputs, features))
        bias = random(2, (features,))
        found, expected = ours(x, kernel, bias), definition(x, kernel) + bias
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_an_up_sampled_part_is_added():
    with jax.enable_x64(True):
        x, up = random(0, (1, 4, 6, 4, CHANNELS)), random(1, (1, 2, 3, 2, 6))
        up = DeferredUpsample(up, random(2, (2, 2, 2, 6, 5)), random(3, (5,)))
        kernel = random(4, (3, 3, 3, CHANNELS + 5, CHANNELS))
        found = ours((x, up), kernel)
        expected = definition(jnp.concatenate([x, up.array()], -1), kernel)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
def test_digits_are_kept(dtype, digits):
    shapes = (1, 8, 12, 12, 64), (3, 3, 3, 64, 64)
    x, kernel = (random(i, shape, dtype) for i, shape in enumerate(shapes))
    found = ours(x, kernel)
    assert found.dtype == dtype
    with jax.enable_x64(True):
        found, x, kernel = (a.astype(jnp.float64) for a in (found, x, kernel))
        expected = definition(x, kernel)
    assert np.abs(found - expected).max() / np.abs(expected).max() < digits


def test_it_is_for_inference_and_for_many_channels():
    def multiplied(channels, differentiated):
        x, kernel = (
            random(i, (*shape, channels), jnp.float32)
            for i, shape in enumerate([(1, 4, 3, 3), (3, 3, 3, channels)])
        )

        def convolve(x, kernel):
            return conv(x, kernel, None, (1, 1, 1), "SAME", None)

        def forward(x, kernel):
            """Computes the forward pass of a gradient, without the backward pass."""
            return jax.vjp(convolve, x, kernel)[0]

        with target_platform("cpu"):
            program = jax.jit(forward if differentiated else convolve)
            return program.lower(x, kernel).compile().cost_analysis()["flops"]

    assert multiplied(CHANNELS, False) < 0.75 * multiplied(CHANNELS, True)
    assert multiplied(CHANNELS - 1, False) > 0.95 * multiplied(CHANNELS - 1, True)
