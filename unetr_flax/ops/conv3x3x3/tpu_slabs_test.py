import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.ops import reductions
from unetr_flax.ops.conv3x3x3 import tpu, tpu_slabs
from unetr_flax.ops.conv3x3x3.operands import Operands
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample
from unetr_flax.ops.testing import random


def operands(own, strides, use_bias, norm=False):
    """Makes the operands of a convolution of two 8 x 4 x 6 volumes to 5 channels."""
    x = random(0, (2, 8, 4, 6, own)) if own else None
    if norm:
        moments = reductions.moments(x, False)
        x = DeferredNorm(
            x, moments, random(7, (own,)), random(8, (own,)), 1e-5, False, 0.1, x.dtype
        )
    up, width = None, own
    if strides:
        coarse = (n // s for n, s in zip((8, 4, 6), strides, strict=True))
        bias = random(3, (4,)) if use_bias else None
        up = DeferredUpsample(random(1, (2, *coarse, 5)), random(2, (*strides, 5, 4)), bias)
        width += 4
    return Operands(x, up, random(4, (3, 3, 3, width, 5)), random(5, (5,)) if use_bias else None)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("own", "strides", "norm"),
    [
        (5, None, False),
        (1, None, False),
        (0, (2, 2, 2), False),
        (5, (2, 2, 2), False),
        (5, (1, 2, 1), False),
        (5, None, True),
        (5, (2, 2, 2), True),
    ],
)
def test_slabs_change_no_number(monkeypatch, own, strides, norm, size, use_bias):
    with jax.enable_x64(True):
        given = operands(own, strides, use_bias, norm)
        grad = random(6, (2, 8, 4, 6, 5))
        options = {"precision": None}
        assert tpu_slabs.slab_size(given) is None
        whole = tpu.forward(given, differentiated=True, **options)
        whole_grads = tpu.backward(given, grad, **options)
        channels = max(given.kernel.shape[-2:])
        monkeypatch.setattr(tpu_slabs, "SLAB_BYTES", size * 4 * 6 * 3 * channels * 8)
        assert tpu_slabs.slab_size(given) == size
        parts = jax.jit(lambda given: tpu.forward(given, differentiated=True, **options))(given)
        grads = jax.jit(lambda *given: tpu.backward(*given, **options))(given, grad)
    for a, b in zip(
        jax.tree.leaves((parts, grads)), jax.tree.leaves((whole, whole_grads)), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_slabs_are_of_whole_coarse_slices_and_divide_the_depth(monkeypatch):
    given = operands(2, (2, 2, 2), True)
    slice_bytes = 4 * 6 * 3 * 6 * 4
    for slices, expected in ((8, None), (7, 4), (3, 2), (1, 2)):
        monkeypatch.setattr(tpu_slabs, "SLAB_BYTES", slices * slice_bytes)
        assert tpu_slabs.slab_size(given) == expected


def test_sums_over_slabs_keep_bfloat16_s_digits(monkeypatch):
    given = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), operands(2, (2, 2, 2), True))
    grad = random(6, (2, 8, 4, 6, 5)).astype(jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (given, grad))
    exact = tpu.backward(*wide, precision="highest")
    monkeypatch.setattr(tpu_slabs, "SLAB_BYTES", 1)
    found = tpu.backward(given, grad, precision=None)
    for name in ("kernel", "bias"):
        a, b = (getattr(grads, name).astype(jnp.float32) for grads in (found, exact))
        assert getattr(found, name).dtype == jnp.bfloat16
        assert np.abs(a - b).max() <= 2**-8 * np.abs(b).max()
