import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.ops import features
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample
from unetr_flax.ops.testing import random


@pytest.fixture(autouse=True)
def memory_is_not_leaked():
    """Checks that the arrays and tracers of a test leave no memories behind."""
    gc.collect()
    before = set(features._MEMORIES)
    yield
    gc.collect()
    assert set(features._MEMORIES) <= before


def norm(x, **options):
    ones = jnp.ones(x.shape[-1], x.dtype)
    options = {"epsilon": 1e-5, "per_sample": True, "negative_slope": 0.1, **options}
    return ops.normalize(x, 2 * ones, ones, **options)[0]


def deconvolve(x, width=2, lowering="auto"):
    options = {"kernel_size": (2, 2, 2), "strides": (2, 2, 2), "padding": "VALID"}
    module = ops.ConvTranspose(width, **options, lowering=lowering)
    kernel = random(7, (2, 2, 2, x.shape[-1], width), x.dtype)
    return module.apply({"params": {"kernel": kernel, "bias": jnp.ones(width, x.dtype)}}, x)


def forget(x):
    """Returns the same numbers in an array without a source."""
    return jax.jit(lambda x: x)(x)


def test_an_array_remembers_its_norm_only_while_it_lives():
    x = random(0, (2, 3, 4, 5))
    before = len(features._MEMORIES)
    y = norm(x)
    assert isinstance(y, jax.Array)
    assert features.norm_of(y).x is x
    assert features.norm_of(x) is None
    assert len(features._MEMORIES) == before + 1
    del y
    assert len(features._MEMORIES) == before


def test_the_whole_chain_of_sources_goes_with_its_last_array():
    before = len(features._MEMORIES)
    y = ops.concatenate([norm(random(0, (1, 4, 4, 4, 3))), deconvolve(random(1, (1, 2, 2, 2, 3)))])
    assert len(features._MEMORIES) == before + 3
    del y
    assert len(features._MEMORIES) == before


def test_another_array_at_the_same_address_remembers_nothing():
    y = norm(random(0, (2, 3, 4, 5)))
    other = random(1, (2, 3, 4, 5))
    features._MEMORIES[id(other)] = features._MEMORIES[id(y)]
    try:
        assert features.norm_of(other) is None
    finally:
        del features._MEMORIES[id(other)]


def test_tracing_leaves_nothing_behind():
    def loss(x):
        y = ops.concatenate([norm(x), deconvolve(norm(x[:, ::2, ::2, ::2]))])
        return ops.recomputed(ops.recompute_sources(y)).sum()

    before = set(features._MEMORIES)
    jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 4, 4, 4, 3)))
    gc.collect()
    assert set(features._MEMORIES) == before


def test_a_failed_trace_leaves_nothing_behind():
    def fail(x):
        norm(x)
        raise ArithmeticError

    before = set(features._MEMORIES)
    with pytest.raises(ArithmeticError):
        jax.eval_shape(fail, jnp.ones((1, 4, 4, 4, 3)))
    gc.collect()
    assert set(features._MEMORIES) == before


def test_plain_lowering_remembers_nothing():
    x = random(0, (1, 2, 2, 2, 3))
    for y in (norm(x, lowering="xla"), deconvolve(x, lowering="xla")):
        assert ops.recompute_sources(y) is y


MADE = {
    "norm": norm,
    "deconvolution": deconvolve,
    "deconvolution of a norm": lambda x: deconvolve(norm(x)),
    "concatenation": lambda x: ops.concatenate([norm(deconvolve(x)), deconvolve(norm(x))]),
    "array": jnp.sin,
}


@pytest.mark.parametrize("name", MADE)
def test_a_jit_boundary_loses_the_source_and_no_number(name):
    x = random(0, (1, 2, 4, 2, 3), jnp.float32)
    y = MADE[name](x)
    lost = forget(y)
    np.testing.assert_array_equal(lost, y)
    assert ops.recompute_sources(lost) is lost
    assert features.conv_operands(lost) is lost
    kernel = {"params": {"kernel": random(1, (3, 3, 3, y.shape[-1], 4), jnp.float32)}}
    conv = ops.Conv(4, (3, 3, 3), use_bias=False)
    expected = conv.apply(kernel, lost)
    np.testing.assert_allclose(
        conv.apply(kernel, y), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", MADE)
def test_sources_are_recomputed_to_the_same_array(name):
    x = random(0, (1, 2, 4, 2, 3), jnp.float32)
    y = MADE[name](x)
    sources = ops.recompute_sources(y)
    again = ops.recomputed(sources)
    assert isinstance(again, jax.Array)
    assert again.dtype == y.dtype
    np.testing.assert_allclose(again, y, rtol=1e-6, atol=1e-6)
    # A recomputed array can be recomputed as well.
    once_more = ops.recomputed(ops.recompute_sources(again))
    np.testing.assert_allclose(once_more, y, rtol=1e-6, atol=1e-6)
    # The sources do not contain the result itself.
    if name != "array":
        assert not any(leaf is y for leaf in jax.tree.leaves(sources))


def test_sources_of_a_concatenation_are_those_of_its_parts():
    x = random(0, (1, 2, 4, 2, 3))
    own, up = norm(deconvolve(x)), deconvolve(norm(x))
    sources = ops.recompute_sources(ops.concatenate([own, up]))
    assert [type(part) for part in sources] == [DeferredNorm, DeferredUpsample]
    assert isinstance(sources[1].x, DeferredNorm)
    assert sources[1].x.x is x


def test_convolutions_start_from_norms_that_are_not_kept_only():
    y = norm(random(0, (2, 3, 4, 5, 3)))
    assert features.conv_operands(y) is y
    again = ops.recomputed(ops.recompute_sources(y))
    assert isinstance(features.conv_operands(again), DeferredNorm)


def program(build, lowering="auto"):
    """Compiles the convolution of an array and a deconvolution from 8^3 to 16^3 voxels."""
    conv = ops.Conv(4, (3, 3, 3), use_bias=False, lowering=lowering)

    @ops.target_platform("cpu")
    def apply(kernel, x, coarse):
        return conv.apply({"params": {"kernel": kernel}}, build(x, coarse))

    shapes = ((3, 3, 3, 3 + 16, 4), (1, 16, 16, 16, 3), (1, 8, 8, 8, 32))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(apply).lower(*arguments).compile().as_text()


def test_convolution_of_a_concatenation_starts_from_the_coarse_grid():
    def concatenated(x, coarse, finish=lambda y: y):
        return finish(ops.concatenate([x, deconvolve(coarse, 16)]))

    text = program(concatenated)
    # The program computes neither the concatenation nor the deconvolution's result.
    assert "f32[1,16,16,16,19]" not in text
    assert "f32[1,16,16,16,16]" not in text
    assert "f32[1,16,16,16,19]" in program(functools.partial(concatenated, finish=forget))


def test_numbers_added_to_a_norm_are_not_lost():
    # The sum is a new array without a source.
    y = norm(random(0, (2, 3, 4, 5))) + 1
    assert features.norm_of(y) is None
