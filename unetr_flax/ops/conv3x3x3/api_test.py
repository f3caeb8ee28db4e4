import types

import jax
import jax.numpy as jnp
import pytest

from unetr_flax.ops.conv import conv, xla_conv
from unetr_flax.ops.conv3x3x3 import tpu, xla
from unetr_flax.ops.conv3x3x3.api import PLATFORMS
from unetr_flax.ops.testing import assert_close, random, value_and_gradients


def convolve(x, kernel, bias=None):
    return conv(x, kernel, bias, (1, 1, 1), "SAME", None)


def definition(x, kernel, bias):
    return xla_conv(x, kernel, (1, 1, 1), "SAME", None) + bias


@pytest.fixture(params=["tpu", "default"])
def platform(request, monkeypatch):
    """Runs the lowering of another platform on CPU, where all of them work."""
    monkeypatch.setitem(PLATFORMS, "cpu", {"tpu": tpu, "default": xla}[request.param])


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("inputs", "features"),
    [(3, 4), (4, 3), (16, 20), (17, 4), (20, 20), (49, 3), (3, 49), (1, 5), (2, 2), (5, 1)],
)
# On TPU slices are those along the longest axis.
@pytest.mark.parametrize("size", [(5, 4, 3), (4, 6, 5), (1, 4, 6)])
def test_other_platforms_compute_the_same_convolution(inputs, features, size):
    with jax.enable_x64(True):
        x, kernel = random(0, (2, *size, inputs)), random(1, (3, 3, 3, inputs, features))
        bias = random(2, (features,))
        ours, theirs = (value_and_gradients(f, x, kernel, bias) for f in (convolve, definition))
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def gradient_of_a_convolution():
    """Makes a freshly traced gradient and its arguments."""

    def loss(x, kernel):
        return (convolve(x, kernel) ** 2).sum()

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 6, 4, 5, 6), (3, 3, 3, 6, 7))
    ]
    return jax.jit(jax.grad(loss, argnums=(0, 1))), arguments


def test_each_platform_gets_its_own_lowering():
    gradient, arguments = gradient_of_a_convolution()
    for platform, taps in (("cpu", True), ("cuda", False), ("tpu", True)):
        text = jax.export.export(gradient, platforms=[platform])(*arguments).mlir_module()
        # The forward pass is a 2D convolution of depth taps, or a 3D one with the kernel itself.
        assert ("tensor<3x3x18x7xf32>) -> tensor<12x4x5x7xf32>" in text) == taps
        assert ("tensor<3x3x3x6x7xf32>) -> tensor<2x6x4x5x7xf32>" in text) != taps
        # Only on CPU is the kernel's gradient a convolution of rows.
        rows = "tensor<6x4x10x7xf32>) -> tensor<18x3x3x7xf32>"
        assert (rows in text) == (platform == "cpu")
    jax.export.export(gradient, platforms=["cpu", "cuda", "tpu"])(*arguments)


@pytest.mark.parametrize("changed", ["cpu", "tpu", "default"])
def test_a_change_of_one_platform_s_convolution_touches_no_other(monkeypatch, changed):
    targets = {"cpu": "cpu", "tpu": "tpu", "default": "cuda"}

    def programs():
        gradient, arguments = gradient_of_a_convolution()
        traced = gradient.trace(*arguments)
        return {
            platform: traced.lower(lowering_platforms=(target,)).as_text()
            for platform, target in targets.items()
        }

    before = programs()
    own = PLATFORMS[changed]

    def negated(operands, **options):
        return -own.forward(operands, **options)

    module = types.SimpleNamespace(forward=negated, backward=own.backward)
    monkeypatch.setitem(PLATFORMS, changed, module)
    for platform, program in programs().items():
        assert (program == before[platform]) == (platform != changed), platform
