import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.conv import conv, xla_conv
from unetr_flax.ops.conv3x3x3 import cpu_subpixel
from unetr_flax.ops.features import DeferredUpsample
from unetr_flax.ops.testing import assert_close, random, value_and_gradients

CONVOLUTIONS = {
    "3x3x3": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 12), (1, 1, 1), "SAME"),
    "3x3x3, one slice": ((2, 1, 6, 5, 3), (3, 3, 3, 3, 12), (1, 1, 1), "SAME"),
    "3x3x3, one voxel": ((2, 1, 1, 1, 3), (3, 3, 3, 3, 12), (1, 1, 1), "SAME"),
    "3x3x3, fewer features": ((2, 4, 6, 5, 12), (3, 3, 3, 12, 3), (1, 1, 1), "SAME"),
    "3x3x3, few weights": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), "SAME"),
    "3x3x3, scanned": ((2, 5, 16, 17, 1), (3, 3, 3, 1, 2), (1, 1, 1), "SAME"),
    "3x3x3, scanned, even": ((2, 4, 16, 17, 2), (3, 3, 3, 2, 1), (1, 1, 1), "SAME"),
    "3x3x3, scanned, one slice": ((2, 1, 16, 17, 1), (3, 3, 3, 1, 2), (1, 1, 1), "SAME"),
    "1x1x1": ((2, 4, 6, 5, 3), (1, 1, 1, 3, 4), (1, 1, 1), "SAME"),
    "patches": ((2, 4, 6, 16, 3), (2, 1, 8, 3, 4), (2, 1, 8), "VALID"),
    "patches, 2D": ((2, 4, 6, 3), (2, 3, 3, 4), (2, 3), "VALID"),
    "patches that leave a rest": ((2, 5, 6, 3), (2, 3, 3, 4), (2, 3), "VALID"),
    "2D": ((2, 4, 6, 3), (3, 3, 3, 4), (1, 1), "SAME"),
    "1D": ((2, 6, 3), (3, 3, 4), (1,), "SAME"),
    "strided": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (2, 1, 1), "SAME"),
    "unpadded": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), "VALID"),
}


def plain_conv(x, kernel, bias, strides, padding, precision=None):
    y = xla_conv(x, kernel, strides, padding, precision)
    return y if bias is None else y + bias


def compare(name, use_bias, dtype, tolerance):
    """Compares `conv` with XLA's own convolution."""
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    x, kernel = random(0, x_shape, dtype), random(1, kernel_shape, dtype)
    bias = random(2, kernel_shape[-1:], dtype) if use_bias else None
    ours, theirs = (
        value_and_gradients(
            lambda x, kernel, bias, f=function: f(x, kernel, bias, strides, padding, None),
            *(x, kernel, bias),
        )
        for function in (conv, plain_conv)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_its_gradients_are_those_of_xla(name, use_bias):
    with jax.enable_x64(True):
        compare(name, use_bias, jnp.float64, 1e-12)


@pytest.mark.parametrize(
    "name", ["3x3x3", "3x3x3, few weights", "3x3x3, scanned", "patches", "1x1x1"]
)
def test_float32(name):
    compare(name, True, jnp.float32, 1e-5)


@pytest.mark.parametrize("features", [4, 12])
@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 3), (2, 13, 16, 17, 3)])
def test_bfloat16_is_rounded_once(shape, features):
    operands = (
        random(0, shape, jnp.bfloat16),
        random(1, (3, 3, 3, 3, features), jnp.bfloat16),
        random(2, (features,), jnp.bfloat16),
    )
    ours = value_and_gradients(lambda *a: conv(*a, (1, 1, 1), "SAME", None), *operands)
    with jax.enable_x64(True):
        wide = (a.astype(jnp.float64) for a in operands)
        y, vjp = jax.vjp(lambda *operands: plain_conv(*operands, (1, 1, 1), "SAME"), *wide)
        exact = (y, *vjp(random(9, y.shape, jnp.bfloat16).astype(jnp.float64)))
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == jnp.bfloat16
            assert_close(a.astype(jnp.float64), b, 2**-8)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 1, 1), (2, 2, 2)])
def test_module_is_that_of_flax(kernel_size, use_bias, lowering):
    options = {
        "strides": kernel_size if kernel_size == (2, 2, 2) else None,
        "use_bias": use_bias,
        "bias_init": nn.initializers.normal(),
        "dtype": jnp.bfloat16,
    }
    x = random(0, (2, 4, 6, 8, 3), jnp.float32)
    ours = ops.Conv(5, kernel_size, **options, lowering=lowering)
    theirs = nn.Conv(5, kernel_size, **options)
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x), 2**-7)


@pytest.mark.parametrize("name", ["3x3x3", "patches, 2D", "1D", "strided", "unpadded"])
def test_plain_definition_is_the_convolution_of_flax(name):
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    with jax.enable_x64(True):
        x, kernel, bias = random(0, x_shape), random(1, kernel_shape), random(2, kernel_shape[-1:])
        module = nn.Conv(kernel_shape[-1], kernel_shape[:-2], strides, padding)

        def theirs(x, kernel, bias):
            return module.apply({"params": {"kernel": kernel, "bias": bias}}, x)

        ours = functools.partial(plain_conv, strides=strides, padding=padding)
        found, expected = (value_and_gradients(f, x, kernel, bias) for f in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": ((0, 1), (1, 2), (0, 0))},
        {"padding": "CIRCULAR"},
        {"kernel_dilation": 2},
        {"input_dilation": (1, 1, 2)},
        {"feature_group_count": 3},
        {"mask": jnp.ones((3, 3, 3, 3, 3))},
    ],
)
def test_other_convolutions_are_refused(options):
    with pytest.raises(ValueError, match="must be 'SAME'"):
        ops.Conv(3, (3, 3, 3), **options).init(jax.random.key(0), jnp.zeros((1, 4, 4, 4, 3)))


def test_convolution_of_too_few_axes_is_refused():
    with pytest.raises(ValueError, match="input of 2 spatial axes"):
        ops.Conv(3, (3, 3, 3)).init(jax.random.key(0), jnp.zeros((4, 4, 4, 3)))


CONCATENATIONS = {
    "array and deconvolution": ((2, 3, 4, 5), 2, 6, 3),
    "deconvolution alone": ((1, 3, 4, 5), 0, 6, 3),
    "slices of many voxels": ((2, 5, 6, 7), 3, 4, 3),
}


@pytest.mark.parametrize("on_coarse_grid", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", CONCATENATIONS)
def test_deferred_upsampling_is_convolved_like_its_result(
    monkeypatch, name, use_bias, on_coarse_grid
):
    size, own, inputs, middle = CONCATENATIONS[name]
    monkeypatch.setattr(cpu_subpixel, "pays", lambda *_: on_coarse_grid)

    def plain(x, up, kernel, bias):
        y = up.array() if x is None else jnp.concatenate([x, up.array()], axis=-1)
        return plain_conv(y, kernel, bias, (1, 1, 1), "SAME")

    def ours(x, up, kernel, bias):
        features = up if x is None else (x, up)
        return conv(features, kernel, bias, (1, 1, 1), "SAME", None)

    with jax.enable_x64(True):
        fine = (size[0], *(2 * s for s in size[1:]))
        operands = (
            random(0, (*fine, own)) if own else None,
            DeferredUpsample(
                random(1, (*size, inputs)),
                random(2, (2, 2, 2, inputs, middle)),
                random(3, (middle,)) if use_bias else None,
            ),
            random(4, (3, 3, 3, own + middle, 4)),
            random(5, (4,)) if use_bias else None,
        )
        y, vjp = jax.vjp(jax.jit(ours), *operands)
        theirs, vjp_theirs = jax.vjp(plain, *operands)
        assert_close(y, theirs)
        cotangent = random(6, y.shape)
        jax.tree.map(assert_close, vjp(cotangent), vjp_theirs(cotangent))


@pytest.mark.parametrize("kernel_size", [(1, 1, 1), (3, 1, 1), (2, 2, 2)])
def test_other_kernels_take_deferred_upsampling_too(kernel_size):
    with jax.enable_x64(True):
        x = random(0, (2, 4, 6, 8, 3))
        up = DeferredUpsample(
            random(1, (2, 2, 3, 4, 5)), random(2, (2, 2, 2, 5, 2)), random(3, (2,))
        )
        kernel, bias = random(4, (*kernel_size, 5, 4)), random(5, (4,))
        strides = kernel_size if kernel_size == (2, 2, 2) else (1, 1, 1)
        ours = conv((x, up), kernel, bias, strides, "SAME", None)
        y = jnp.concatenate([x, up.array()], axis=-1)
        assert_close(ours, plain_conv(y, kernel, bias, strides, "SAME"))


def test_only_the_arguments_are_kept_for_the_backward_pass():
    up = DeferredUpsample(jnp.ones((2, 2, 3, 2, 5)), jnp.ones((2, 2, 2, 5, 2)), jnp.ones(2))
    operands = jnp.ones((2, 4, 6, 4, 3)), up, jnp.ones((3, 3, 3, 5, 4)), jnp.ones(4)
    _, vjp = jax.vjp(lambda x, up, *rest: conv((x, up), *rest, (1, 1, 1), "SAME", None), *operands)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(vjp))
    assert kept == sorted(leaf.shape for leaf in jax.tree.leaves(operands))


def test_vmap_and_second_derivatives():
    with jax.enable_x64(True):
        x, kernel, bias = random(0, (3, 1, 4, 3, 5, 2)), random(1, (3, 3, 3, 2, 2)), random(2, (2,))

        def second_derivative(conv):
            def one(x, kernel):
                return (conv(x, kernel, bias, (1, 1, 1), "SAME", None) ** 3).sum()

            def total(kernel):
                grads = jax.vmap(jax.grad(one, argnums=1), in_axes=(0, None))(x, kernel)
                return (grads**2).sum()

            return jax.grad(total)(kernel)

        assert_close(second_derivative(conv), second_derivative(plain_conv), 1e-10)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_the_gradient_of_a_bias_in_bfloat16_is_summed_in_float32(lowering):
    conv = ops.Conv(2, kernel_size=(1, 1, 1), dtype=jnp.bfloat16, lowering=lowering)
    params = {"kernel": jnp.ones((1, 1, 1, 1, 2)), "bias": jnp.zeros(2)}
    image = jnp.ones((1, 16, 32, 32, 1))

    def total(params):
        return conv.apply({"params": params}, image).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(total))(params)["bias"]
    # Added up one after the other in bfloat16, ones stop counting at 256.
    np.testing.assert_array_equal(grad, 16 * 32 * 32)
