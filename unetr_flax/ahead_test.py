import gc

import jax
import jax.numpy as jnp
import pytest

from unetr_flax.ahead import compile_ahead, compiled_once


def test_the_first_call_compiles_and_later_ones_do_not():
    traced = []

    @jax.jit
    def double(x):
        traced.append(gc.isenabled())
        return 2 * x

    call = compiled_once(double)
    assert [float(call(jnp.float32(x))) for x in range(3)] == [0, 2, 4]
    assert traced == [False]  # the collector was off
    assert gc.isenabled()


def test_other_shapes_are_refused():
    call = compiled_once(jax.jit(lambda x: x))
    call(jnp.zeros(2))
    with pytest.raises(TypeError, match="float32\\[3\\]"):
        call(jnp.zeros(3))


def test_the_collector_stays_as_it_was():
    @jax.jit
    def fail(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        compile_ahead(fail, jnp.zeros(2))
    assert gc.isenabled()
    gc.disable()
    try:
        compile_ahead(jax.jit(lambda x: x), jnp.zeros(2))
        assert not gc.isenabled()
    finally:
        gc.enable()
