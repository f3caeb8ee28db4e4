import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.ops.norm import tpu_in_place


def compute(x, y, factor, shift):
    """Computes elementwise with a factor [1, C] and a shift [C]."""
    return x * factor.reshape(-1) + jnp.square(y.astype(x.dtype)) + shift


def operands(dtype, shape=(2, 6, 3, 4, 5)):
    rng = np.random.default_rng(0)
    shapes = (shape, shape, (1, shape[-1]), (shape[-1],))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(("slices", "size"), [(1, 1), (2, 2), (4, 3), (5, 3), (6, None)])
def test_parts_change_no_number(monkeypatch, slices, size):
    with jax.enable_x64(True):
        given = operands(jnp.float64)
        monkeypatch.setattr(tpu_in_place, "PART_BYTES", slices * 3 * 4 * 5 * 8)
        assert tpu_in_place.part_size(given[1]) == size
        found = jax.jit(lambda *given: tpu_in_place.elementwise(compute, *given))(*given)
        expected = compute(*given)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_parts_keep_the_dtype(monkeypatch):
    monkeypatch.setattr(tpu_in_place, "PART_BYTES", 1)
    x, y, *values = operands(jnp.float32)
    found = tpu_in_place.elementwise(compute, x, y.astype(jnp.bfloat16), *values)
    assert found.dtype == jnp.bfloat16


def test_values_may_differ_by_sample(monkeypatch):
    monkeypatch.setattr(tpu_in_place, "PART_BYTES", 1)
    x, y, factor, shift = operands(jnp.float32)
    by_sample = jnp.stack([shift, 2 * shift]).reshape(2, 1, 1, 1, -1)
    found = tpu_in_place.elementwise(compute, x, y, factor, by_sample)
    np.testing.assert_allclose(found, compute(x, y, factor, by_sample), rtol=1e-6)


def test_few_axes_are_computed_at_once(monkeypatch):
    monkeypatch.setattr(tpu_in_place, "PART_BYTES", 1)

    def program(given):
        return str(jax.make_jaxpr(lambda *given: tpu_in_place.elementwise(compute, *given))(*given))

    assert "scan" in program(operands(jnp.float32))
    assert "scan" not in program(operands(jnp.float32, (2, 6, 5)))
