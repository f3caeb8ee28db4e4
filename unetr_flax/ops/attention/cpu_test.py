import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops.attention import cpu

# Two samples need two blocks, the second of which is padded.
SHAPE = (2, 601, 3, 8)
SCALE = 0.2


def attend(lowering):
    return functools.partial(ops.dot_product_attention, scale=SCALE, lowering=lowering)


def pull_back(lowering):
    return jax.jit(lambda *inputs, grad: jax.vjp(attend(lowering), *inputs)[1](grad))


def arrays(dtype, shape=SHAPE):
    keys = jax.random.split(jax.random.key(0), 4)
    return [2 * jax.random.normal(key, shape, dtype) for key in keys]


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 2e-6)])
def test_blocks_have_the_result_and_gradients_of_the_definition(dtype, tolerance):
    with jax.enable_x64():
        *inputs, grad = arrays(dtype)
        assert cpu.is_available(*inputs[:2])
        blocks, plain = (jax.jit(attend(lowering))(*inputs) for lowering in ("auto", "xla"))
        assert blocks.dtype == dtype
        assert_near([blocks], [plain], tolerance)
        blocks, plain = (pull_back(lowering)(*inputs, grad=grad) for lowering in ("auto", "xla"))
        assert_near(blocks, plain, tolerance)


def test_other_platforms_have_the_same_gradients():
    with jax.enable_x64():
        *inputs, grad = arrays("float64")
        out, log_sums = cpu._attend_at_once(*inputs, scale=SCALE)
        found = cpu._gradients_at_once(*inputs, out, log_sums, grad, scale=SCALE)
        assert_near(found, pull_back("xla")(*inputs, grad=grad), 1e-14)
        # The choice of a platform takes results of one shape.
        shapes = (jax.tree.map(jnp.shape, cpu._attend(*inputs, scale=SCALE)),)
        assert shapes == (jax.tree.map(jnp.shape, (out, log_sums)),)


def test_energies_may_be_large():
    *inputs, _ = arrays("float32")
    blocks, plain = (attend(lowering)(inputs[0] * 1e3, *inputs[1:]) for lowering in ("auto", "xla"))
    assert np.isfinite(blocks).all()
    assert_near([blocks], [plain], 1e-3)


def test_weights_are_never_in_memory_at_once():
    *inputs, grad = arrays("float32", (1, 2048, 2, 8))
    temporary = {
        lowering: pull_back(lowering)
        .lower(*inputs, grad=grad)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for lowering in ("auto", "xla")
    }
    weights = 2 * 2048**2 * 4
    assert temporary["xla"] > weights
    assert temporary["auto"] < weights / 2


def test_ensembles_and_second_derivatives_are_those_of_the_definition():
    with jax.enable_x64():
        *inputs, grad = arrays("float64", (1, 512, 1, 2))

        def slope(lowering, query):
            def along(step):
                energies = attend(lowering)(query * step, *inputs[1:])
                return (energies * grad).sum()

            return jax.grad(lambda step: jax.grad(along)(step) ** 2)(1.0)

        queries = jnp.stack([inputs[0], inputs[0] / 2])
        found, expected = (
            jax.jit(jax.vmap(functools.partial(slope, lowering)))(queries)
            for lowering in ("auto", "xla")
        )
        assert_near(found, expected, 1e-12)


def test_forward_mode_is_refused_in_one_line_that_names_the_way():
    *inputs, _ = arrays("float32")
    with pytest.raises(TypeError, match='lowering="xla"'):
        jax.jvp(attend("auto"), inputs, inputs)


@pytest.mark.parametrize(
    ("shape", "dtype", "platform"),
    [
        ((1, 511, 1, 8), "float32", "cpu"),
        ((1, 512, 1, 8), "bfloat16", "cpu"),
        ((1, 512, 1, 8), "float32", "tpu"),
        ((1, 512, 1, 8), "float32", "gpu"),
    ],
)
def test_few_keys_short_numbers_and_other_platforms_have_the_plain_form(shape, dtype, platform):
    query = jax.ShapeDtypeStruct(shape, dtype)
    with ops.target_platform(platform):
        assert not cpu.is_available(query, query)
    enough = jax.ShapeDtypeStruct((1, 512, 1, 8), "float32")
    with ops.target_platform("cpu"):
        assert cpu.is_available(enough, enough)


def test_an_empty_batch_has_empty_results():
    *inputs, grad = (x[:0] for x in arrays("float32", (1, 512, 1, 2)))
    assert attend("auto")(*inputs).shape == (0, 512, 1, 2)
    assert [x.shape for x in pull_back("auto")(*inputs, grad=grad)] == 3 * [(0, 512, 1, 2)]


def test_masks_have_the_plain_form():
    *inputs, _ = arrays("float32")
    mask = jnp.tri(SHAPE[1], dtype=bool)
    masked = [attend(lowering)(*inputs, mask) for lowering in ("auto", "xla")]
    np.testing.assert_array_equal(*masked)


def test_exported_programs_may_leave_the_batch_open():
    *inputs, _ = arrays("float32")
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *SHAPE[1:]), "float32")
    attention = jax.jit(attend("auto"))
    exported = jax.export.export(attention, platforms=("cpu", "cuda", "tpu"))(shape, shape, shape)
    assert_near([exported.call(*inputs)], [attention(*inputs)], 1e-6)


PROGRAM = """
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import NamedSharding, PartitionSpec
from unetr_flax import ops

axis = jax.sharding.AxisType.Auto
mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
shape = jax.ShapeDtypeStruct((2, 512, 2, 8), jnp.float32, sharding=sharding)

def loss(query, key, value):
    return jnp.square(ops.dot_product_attention(query, key, value, scale=0.2)).sum()

program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
text = program.as_text()
assert " while(" in text
for exchange in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert exchange not in text, exchange
assert all(own.spec == sharding.spec for own in program.output_shardings)
"""


def test_devices_that_share_a_batch_exchange_nothing():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
