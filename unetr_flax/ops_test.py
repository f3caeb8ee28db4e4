import functools
import itertools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unetr_flax import ops


def random(seed, shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def dimension_numbers(ndim):
    axes = "NHWDXYZ"[1 : ndim - 1]
    return lax.conv_dimension_numbers(
        (1,) * ndim, (1,) * ndim, (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    )


def value_and_gradients(conv, x, kernel, strides, padding):
    def call(x, kernel):
        return conv(x, kernel, strides, padding, dimension_numbers=dimension_numbers(x.ndim))

    y, vjp = jax.vjp(jax.jit(call), x, kernel)
    return (y, *vjp(random(9, y.shape, y.dtype)))


CONVOLUTIONS = {
    "3x3x3": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), "SAME"),
    "3x3x3, one slice": ((2, 1, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), "SAME"),
    "3x3x3, one voxel": ((2, 1, 1, 1, 3), (3, 3, 3, 3, 4), (1, 1, 1), "SAME"),
    "3x3x3, fewer features": ((2, 4, 6, 5, 4), (3, 3, 3, 4, 3), (1, 1, 1), "SAME"),
    "3x3x3, scanned": ((2, 5, 14, 16, 1), (3, 3, 3, 1, 2), (1, 1, 1), "SAME"),
    "3x3x3, scanned, fewer features": ((2, 5, 14, 16, 3), (3, 3, 3, 3, 2), (1, 1, 1), "SAME"),
    "1x1x1": ((2, 4, 6, 5, 3), (1, 1, 1, 3, 4), (1, 1, 1), "SAME"),
    "patches": ((2, 4, 6, 16, 3), (2, 1, 8, 3, 4), (2, 1, 8), "VALID"),
    "patches, 2D": ((2, 4, 6, 3), (2, 3, 3, 4), (2, 3), "VALID"),
    "patches that leave a rest": ((2, 5, 6, 3), (2, 3, 3, 4), (2, 3), "VALID"),
    "2D": ((2, 4, 6, 3), (3, 3, 3, 4), (1, 1), "SAME"),
    "1D": ((2, 6, 3), (3, 3, 4), (1,), "SAME"),
    "strided": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (2, 1, 1), "SAME"),
    "unpadded": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), "VALID"),
    "padded by hand": ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4), (1, 1, 1), ((0, 1), (1, 2), (0, 0))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_its_gradients_are_those_of_jax(name):
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    with jax.enable_x64(True):
        x, kernel = random(0, x_shape), random(1, kernel_shape)
        ours = value_and_gradients(ops.conv_general_dilated, x, kernel, strides, padding)
        theirs = value_and_gradients(lax.conv_general_dilated, x, kernel, strides, padding)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["3x3x3", "3x3x3, scanned", "patches", "1x1x1"])
def test_float32(name):
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    x, kernel = random(0, x_shape, jnp.float32), random(1, kernel_shape, jnp.float32)
    ours = value_and_gradients(ops.conv_general_dilated, x, kernel, strides, padding)
    theirs = value_and_gradients(lax.conv_general_dilated, x, kernel, strides, padding)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 3), (2, 32, 12, 10, 3)])
def test_bfloat16_is_rounded_once(shape):
    x, kernel = random(0, shape, jnp.bfloat16), random(1, (3, 3, 3, 3, 4), jnp.bfloat16)
    ours = value_and_gradients(ops.conv_general_dilated, x, kernel, (1, 1, 1), "SAME")
    with jax.enable_x64(True):
        x, kernel = x.astype(jnp.float64), kernel.astype(jnp.float64)
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=dimension_numbers(5))
        y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, (1, 1, 1), "SAME"), x, kernel)
        exact = (y, *vjp(random(9, y.shape, jnp.bfloat16).astype(jnp.float64)))
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == jnp.bfloat16
            assert_close(a.astype(jnp.float64), b, 2**-8)


@pytest.mark.parametrize("kernel_shape", [(3, 3, 3, 2, 4), (1, 1, 1, 2, 4)])
def test_errors_are_those_of_jax(kernel_shape):
    x, options = jnp.ones((2, 4, 6, 5, 3)), {"dimension_numbers": dimension_numbers(5)}
    with pytest.raises(ValueError, match="feature dimension"):
        ops.conv_general_dilated(x, jnp.ones(kernel_shape), (1, 1, 1), "SAME", **options)
    kernel = jnp.ones((*kernel_shape[:3], 3, 4), jnp.bfloat16)
    with pytest.raises(TypeError, match="same dtypes"):
        ops.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_element_type_of_the_result(dtype):
    x, kernel = jnp.ones((2, 4, 6, 5, 3), dtype), jnp.ones((3, 3, 3, 3, 4), dtype)
    options = {"dimension_numbers": dimension_numbers(5)}
    for result in (None, jnp.float32):
        options["preferred_element_type"] = result
        ours = ops.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options)
        assert_close(ours, lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options), 0)


def test_groups_and_dilation_are_left_to_jax():
    x, kernel = random(0, (2, 4, 6, 5, 4), jnp.float32), random(1, (3, 3, 3, 2, 4), jnp.float32)
    options = {
        "dimension_numbers": dimension_numbers(5),
        "feature_group_count": 2,
        "rhs_dilation": (1, 2, 1),
    }
    ours = ops.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options)
    assert_close(ours, lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options))


@pytest.mark.parametrize("strides", [*itertools.product((1, 2), repeat=3), (2, 1), (2,)])
def test_deconvolution_and_its_gradients_are_those_of_flax(strides):
    with jax.enable_x64(True):
        x = random(0, (2, *(3, 4, 2)[: len(strides)], 5))
        options = {"kernel_size": strides, "strides": strides, "padding": "VALID"}
        module = ops.ConvTranspose(4, **options, param_dtype=jnp.float64)
        theirs = nn.ConvTranspose(4, **options, param_dtype=jnp.float64)
        variables = theirs.init(jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: random(leaf.ndim, leaf.shape), variables)
        y, vjp = jax.vjp(jax.jit(module.apply), variables, x)
        y_theirs, vjp_theirs = jax.vjp(theirs.apply, variables, x)
        cotangent = random(3, y.shape)
        assert_close(y, y_theirs)
        jax.tree.map(assert_close, vjp(cotangent), vjp_theirs(cotangent))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_deconvolution_takes_the_shapes_and_types_of_flax(batch):
    x = random(0, (*batch, 4, 3), jnp.bfloat16)
    options = {"kernel_size": 2, "strides": 2, "padding": "VALID", "dtype": jnp.bfloat16}
    for result in (None, jnp.float32):
        ours = ops.ConvTranspose(4, **options, use_bias=False, preferred_element_type=result)
        theirs = nn.ConvTranspose(4, **options, use_bias=False, preferred_element_type=result)
        variables = theirs.init(jax.random.key(0), x)
        assert_close(ours.apply(variables, x), theirs.apply(variables, x), 2**-8)
        gradient, _ = jax.grad(lambda *a, m=ours: (m.apply(*a) ** 2).sum(), (0, 1))(variables, x)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3), "strides": (2, 2), "padding": "VALID"},
        {"kernel_size": (2, 2), "strides": (2, 2), "padding": "SAME"},
        {"kernel_size": (2, 2), "strides": None, "padding": "VALID"},
        {"kernel_size": (2, 2), "strides": (2, 2), "padding": "VALID", "transpose_kernel": True},
    ],
)
def test_other_deconvolutions_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        ops.ConvTranspose(4, **options).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


def test_vmap_and_second_derivatives():
    with jax.enable_x64(True):
        x, kernel = random(0, (3, 1, 4, 3, 5, 2)), random(1, (3, 3, 3, 2, 2))

        def second_derivative(conv):
            def one(x, kernel):
                y = conv(x, kernel, (1, 1, 1), "SAME", dimension_numbers=dimension_numbers(5))
                return (y**3).sum()

            def total(kernel):
                grads = jax.vmap(jax.grad(one, argnums=1), in_axes=(0, None))(x, kernel)
                return (grads**2).sum()

            return jax.grad(total)(kernel)

        ours = second_derivative(ops.conv_general_dilated)
        assert_close(ours, second_derivative(lax.conv_general_dilated), 1e-10)


@pytest.mark.parametrize(
    ("inputs", "features"), [(3, 4), (4, 3), (16, 20), (17, 4), (20, 20), (49, 3), (3, 49)]
)
@pytest.mark.parametrize("depth", [1, 5])
def test_what_tpus_run_is_the_same_convolution(monkeypatch, inputs, features, depth):
    # There is no TPU here, but its lowering runs anywhere.
    def on_tpu(*operands, tpu=None, default, **others):
        return (tpu or default)(*operands)

    monkeypatch.setattr(lax, "platform_dependent", on_tpu)
    with jax.enable_x64(True):
        x, kernel = random(0, (2, depth, 4, 6, inputs)), random(1, (3, 3, 3, inputs, features))
        ours = value_and_gradients(ops.conv_general_dilated, x, kernel, (1, 1, 1), "SAME")
        theirs = value_and_gradients(lax.conv_general_dilated, x, kernel, (1, 1, 1), "SAME")
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_each_platform_gets_its_own_lowering():
    def loss(x, kernel):
        y = ops.conv_general_dilated(
            x, kernel, (1, 1, 1), "SAME", dimension_numbers=dimension_numbers(5)
        )
        return (y**2).sum()

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4, 6, 5, 3), (3, 3, 3, 3, 4))
    ]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for platform, taps in (("cpu", True), ("cuda", False), ("tpu", True)):
        text = jax.export.export(gradient, platforms=[platform])(*arguments).mlir_module()
        # The forward pass is a 2D convolution of 3 x 3 channels, or one with the kernel as it is.
        assert ("tensor<3x3x9x4xf32>) -> tensor<8x6x5x4xf32>" in text) == taps
        assert ("tensor<3x3x3x3x4xf32>) -> tensor<2x4x6x5x4xf32>" in text) != taps
        # The kernel's gradient is a product on CPU only.
        assert ("dot_general" in text) == (platform == "cpu")
    jax.export.export(gradient, platforms=["cpu", "cuda", "tpu"])(*arguments)


def test_only_the_arguments_are_kept_for_the_backward_pass():
    x, kernel = jnp.ones((2, 4, 6, 5, 3)), jnp.ones((3, 3, 3, 3, 4))
    options = {"dimension_numbers": dimension_numbers(5)}
    _, vjp = jax.vjp(
        lambda x, kernel: ops.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", **options),
        x,
        kernel,
    )
    assert [leaf.shape for leaf in jax.tree.leaves(vjp)] == [x.shape, kernel.shape]


def test_batch_sharded_over_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unetr_flax import blocks
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (4, 4, 12, 5, 3))
module = blocks.Deconv3DBlock(4, (2, 1, 2), param_dtype=x.dtype)
variables = module.init(jax.random.key(1), x)
def loss(params, x):
    y, updated = module.apply(
        {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
    )
    return (y ** 2).mean(), updated
step = jax.jit(jax.value_and_grad(loss, has_aux=True))
alone = step(variables["params"], x)
sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
together = step(variables["params"], sharded)
assert "all-gather" not in step.lower(variables["params"], sharded).compile().as_text()
for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert len(a.sharding.device_set) == 2
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 37, 5, 3), (2, 40, 3), (5, 3)])
def test_normalisation_and_its_gradients_are_those_of_its_definition(shape, per_sample):
    def definition(x, scale, bias):
        axes = tuple(range(1 if per_sample else 0, x.ndim - 1))
        mean = x.mean(axes, keepdims=True)
        var = jnp.square(x - mean).mean(axes, keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias
        return y, mean.reshape(-1, x.shape[-1]), var.reshape(-1, x.shape[-1])

    with jax.enable_x64(True):
        arguments = random(0, shape), random(1, shape[-1:]), random(2, shape[-1:])
        ours, vjp = jax.vjp(lambda *a: ops.normalize(*a, 1e-3, per_sample), *arguments)
        theirs, vjp_theirs = jax.vjp(definition, *arguments)
        cotangents = tuple(random(3 + i, y.shape) for i, y in enumerate(theirs))
        for a, b in zip((*ours, *vjp(cotangents)), (*theirs, *vjp_theirs(cotangents)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_linear_map_and_its_gradients_are_those_of_jax():
    with jax.enable_x64(True):
        x, kernel = random(0, (2, 5, 3, 4)), random(1, (3, 4, 2, 6))
        for dimensions in ((((2, 3), (0, 1)), ((), ())), (((3,), (1,)), ((0,), (2,)))):
            y, vjp = jax.vjp(lambda a, b, d=dimensions: ops.dot_general(a, b, d), x, kernel)
            theirs, vjp_theirs = jax.vjp(
                lambda a, b, d=dimensions: lax.dot_general(a, b, d), x, kernel
            )
            for a, b in zip((y, *vjp(y)), (theirs, *vjp_theirs(y)), strict=True):
                assert_close(a, b)
