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
from unetr_flax.ops.conv import conv
from unetr_flax.ops.conv3x3x3 import cpu_subpixel as subpixel
from unetr_flax.ops.conv3x3x3 import tpu as conv3x3x3_tpu
from unetr_flax.ops.conv3x3x3.api import PLATFORMS
from unetr_flax.ops.features import DeferredUpsample
from unetr_flax.ops.materialize import gradient_once, materialize
from unetr_flax.ops.upsample.api import FORMS


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


def plain_conv(x, kernel, bias, strides, padding, precision=None):
    y = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=dimension_numbers(x.ndim),
        precision=precision,
    )
    return y if bias is None else y + bias


def value_and_gradients(conv, x, kernel, bias, strides, padding):
    y, vjp = jax.vjp(
        jax.jit(lambda *operands: conv(*operands, strides, padding, None)), x, kernel, bias
    )
    return jax.tree.leaves((y, *vjp(random(9, y.shape, y.dtype))))


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


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_its_gradients_are_those_of_jax(name, use_bias):
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    with jax.enable_x64(True):
        x, kernel = random(0, x_shape), random(1, kernel_shape)
        bias = random(2, kernel_shape[-1:]) if use_bias else None
        ours = value_and_gradients(conv, x, kernel, bias, strides, padding)
        theirs = value_and_gradients(plain_conv, x, kernel, bias, strides, padding)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["3x3x3", "3x3x3, few weights", "3x3x3, scanned", "patches", "1x1x1"]
)
def test_float32(name):
    x_shape, kernel_shape, strides, padding = CONVOLUTIONS[name]
    x, kernel = random(0, x_shape, jnp.float32), random(1, kernel_shape, jnp.float32)
    bias = random(2, kernel_shape[-1:], jnp.float32)
    ours = value_and_gradients(conv, x, kernel, bias, strides, padding)
    theirs = value_and_gradients(plain_conv, x, kernel, bias, strides, padding)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("features", [4, 12])
@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 3), (2, 13, 16, 17, 3)])
def test_bfloat16_is_rounded_once(shape, features):
    x, kernel = random(0, shape, jnp.bfloat16), random(1, (3, 3, 3, 3, features), jnp.bfloat16)
    bias = random(2, (features,), jnp.bfloat16)
    ours = value_and_gradients(conv, x, kernel, bias, (1, 1, 1), "SAME")
    with jax.enable_x64(True):
        wide = (a.astype(jnp.float64) for a in (x, kernel, bias))
        y, vjp = jax.vjp(lambda *operands: plain_conv(*operands, (1, 1, 1), "SAME"), *wide)
        exact = (y, *vjp(random(9, y.shape, jnp.bfloat16).astype(jnp.float64)))
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == jnp.bfloat16
            assert_close(a.astype(jnp.float64), b, 2**-8)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 1, 1), (2, 2, 2)])
def test_module_is_flax_s(kernel_size, use_bias):
    options = {
        "strides": kernel_size if kernel_size == (2, 2, 2) else None,
        "use_bias": use_bias,
        "bias_init": nn.initializers.normal(),
        "dtype": jnp.bfloat16,
    }
    x = random(0, (2, 4, 6, 8, 3), jnp.float32)
    ours, theirs = (kind(5, kernel_size, **options) for kind in (ops.Conv, nn.Conv))
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x), 2**-7)


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


JOINED = {
    "array and deconvolution": ((2, 3, 4, 5), 2, 6, 3),
    "deconvolution alone": ((1, 3, 4, 5), 0, 6, 3),
    "slices of many voxels": ((2, 5, 6, 7), 3, 4, 3),
}


@pytest.mark.parametrize("on_coarse_grid", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", JOINED)
def test_joined_features_are_convolved_like_their_concatenation(
    monkeypatch, name, use_bias, on_coarse_grid
):
    size, own, inputs, middle = JOINED[name]
    monkeypatch.setattr(subpixel, "pays", lambda *_: on_coarse_grid)

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


def test_coarse_grid_is_taken_where_it_needs_fewer_multiplications():
    def pays(voxels, inputs, middle, strides=(2, 2, 2)):
        return subpixel.pays(
            jax.ShapeDtypeStruct((1, voxels, 10, 10, inputs), jnp.float32),
            jax.ShapeDtypeStruct((*strides, inputs, middle), jnp.float32),
            jax.ShapeDtypeStruct((3, 3, 3, middle, middle), jnp.float32),
        )

    assert pays(10, 32, 16)
    assert not pays(10, 32, 16, (2, 1, 2))
    assert not pays(10, 96, 16)  # 64 * 96 * 16 a coarse voxel, not 8 * (27 * 16 * 16 + 96 * 16)
    assert not pays(1, 64, 32)  # composing the kernels is more than the rest


@pytest.mark.parametrize("kernel_size", [(1, 1, 1), (3, 1, 1), (2, 2, 2)])
def test_other_kernels_take_joined_features_too(kernel_size):
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


@pytest.fixture(params=["this platform", "TPU"])
def lowering(request, monkeypatch):
    """There is no TPU here, but its lowering runs anywhere."""
    if request.param == "TPU":
        monkeypatch.setitem(FORMS, "cpu", FORMS["tpu"])


@pytest.mark.usefixtures("lowering")
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
        x, kernel, bias = random(0, (3, 1, 4, 3, 5, 2)), random(1, (3, 3, 3, 2, 2)), random(2, (2,))

        def second_derivative(conv):
            def one(x, kernel):
                return (conv(x, kernel, bias, (1, 1, 1), "SAME", None) ** 3).sum()

            def total(kernel):
                grads = jax.vmap(jax.grad(one, argnums=1), in_axes=(0, None))(x, kernel)
                return (grads**2).sum()

            return jax.grad(total)(kernel)

        assert_close(second_derivative(conv), second_derivative(plain_conv), 1e-10)


@pytest.mark.parametrize(
    ("inputs", "features"),
    [(3, 4), (4, 3), (16, 20), (17, 4), (20, 20), (49, 3), (3, 49), (1, 5), (2, 2), (5, 1)],
)
@pytest.mark.parametrize("depth", [1, 5])
def test_what_tpus_run_is_the_same_convolution(monkeypatch, inputs, features, depth):
    # There is no TPU here, but its lowering runs anywhere.
    monkeypatch.setitem(PLATFORMS, "cpu", conv3x3x3_tpu)
    with jax.enable_x64(True):
        x, kernel = random(0, (2, depth, 4, 6, inputs)), random(1, (3, 3, 3, inputs, features))
        bias = random(2, (features,))
        ours = value_and_gradients(conv, x, kernel, bias, (1, 1, 1), "SAME")
        theirs = value_and_gradients(plain_conv, x, kernel, bias, (1, 1, 1), "SAME")
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_each_platform_gets_its_own_lowering():
    def loss(x, kernel):
        return (conv(x, kernel, None, (1, 1, 1), "SAME", None) ** 2).sum()

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4, 6, 5, 6), (3, 3, 3, 6, 7))
    ]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for platform, taps in (("cpu", True), ("cuda", False), ("tpu", True)):
        text = jax.export.export(gradient, platforms=[platform])(*arguments).mlir_module()
        # The forward pass is a 2D convolution of depth taps, or one with the kernel as it is.
        assert ("tensor<3x3x18x7xf32>) -> tensor<8x6x5x7xf32>" in text) == taps
        assert ("tensor<3x3x3x6x7xf32>) -> tensor<2x4x6x5x7xf32>" in text) != taps
        # The kernel's gradient is one of rows on CPU only.
        rows = "tensor<4x6x10x7xf32>) -> tensor<18x3x3x7xf32>"
        assert (rows in text) == (platform == "cpu")
    jax.export.export(gradient, platforms=["cpu", "cuda", "tpu"])(*arguments)


def test_only_the_arguments_are_kept_for_the_backward_pass():
    up = DeferredUpsample(jnp.ones((2, 2, 3, 2, 5)), jnp.ones((2, 2, 2, 5, 2)), jnp.ones(2))
    operands = jnp.ones((2, 4, 6, 4, 3)), up, jnp.ones((3, 3, 3, 5, 4)), jnp.ones(4)
    _, vjp = jax.vjp(lambda x, up, *rest: conv((x, up), *rest, (1, 1, 1), "SAME", None), *operands)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(vjp))
    assert kept == sorted(leaf.shape for leaf in jax.tree.leaves(operands))


def test_what_is_computed_once_is_so_on_cpu():
    def uses(z):
        return z.T, jnp.sin(z), (z**2).sum(0)

    def again(x, y):
        return uses(x * 2 + y)

    def kept(x, y):
        return uses(materialize(lambda x, y: x * 2 + y, y, x, y))

    x, y = random(0, (64, 48), jnp.float32), random(1, (64, 48), jnp.float32)
    additions = [
        jax.jit(f).lower(x, y).compile().as_text().count("f32[64,48]{1,0} add(")
        for f in (again, kept)
    ]
    for a, b in zip(again(x, y), jax.jit(kept)(x, y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert additions[1] == 1 < additions[0]


def test_the_work_of_a_gradient_grows_with_the_blocks_on_cpu():
    def objective(x, kernel, blocks):
        for _ in range(blocks):
            x = gradient_once(x)
            centered = x - x.mean(-1, keepdims=True)
            normed = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True))
            x = x + jnp.tanh(normed @ kernel) @ kernel.T
        return x.sum()

    x, kernel = random(0, (64, 48), jnp.float32), random(1, (48, 48), jnp.float32)
    gradient = jax.jit(jax.grad(objective), static_argnums=2)
    additions = [
        gradient.lower(x, kernel, blocks).compile().as_text().count(" add(")
        for blocks in (4, 8, 16)
    ]
    # Twice as many for twice the blocks: without, they quadruple.
    assert additions[2] - additions[1] == 2 * (additions[1] - additions[0]) > 0


def test_batch_sharded_over_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unetr_flax.model import blocks
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


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.25])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 37, 5, 3), (2, 40, 3), (5, 3)])
def test_normalization_and_its_gradients_are_those_of_its_definition(shape, per_sample, slope):
    def definition(x, scale, bias):
        axes = tuple(range(1 if per_sample else 0, x.ndim - 1))
        mean = x.mean(axes, keepdims=True)
        var = jnp.square(x - mean).mean(axes, keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias
        y = jnp.where(y > 0, y, slope * y)
        return y, mean.reshape(-1, x.shape[-1]), var.reshape(-1, x.shape[-1])

    with jax.enable_x64(True):
        arguments = random(0, shape), random(1, shape[-1:]), random(2, shape[-1:])
        ours, vjp = jax.vjp(lambda *a: ops.normalize(*a, 1e-3, per_sample, slope), *arguments)
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
