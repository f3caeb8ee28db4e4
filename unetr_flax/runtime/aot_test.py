import gc
import threading

import jax
import jax.numpy as jnp
import pytest

from unetr_flax.runtime.aot import aot_compile, compile_in_background

FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


def test_compiles_in_the_background_and_once():
    traced = []
    started, go_on = threading.Event(), threading.Event()

    @jax.jit
    def double(x):
        started.set()
        assert go_on.wait(60)
        traced.append(gc.isenabled())
        return 2 * x

    call = compile_in_background(double, FLOAT)
    assert started.wait(60)  # before anybody calls the result
    go_on.set()
    assert [float(call(jnp.float32(x))) for x in range(3)] == [0, 2, 4]
    assert traced == [False]  # traced once, with the collector off
    assert gc.isenabled()


def test_a_call_raises_the_error_of_compiling():
    @jax.jit
    def fail(x):
        raise ArithmeticError("no")

    call = compile_in_background(fail, FLOAT)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no"):
            call(jnp.float32(1))


def test_other_shapes_are_refused():
    call = compile_in_background(jax.jit(lambda x: x), jnp.zeros(2))
    call(jnp.zeros(2))
    with pytest.raises(TypeError, match="float32\\[3\\]"):
        call(jnp.zeros(3))


def test_the_collector_is_left_as_it_was():
    @jax.jit
    def fail(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        aot_compile(fail, jnp.zeros(2))
    assert gc.isenabled()
    gc.disable()
    try:
        aot_compile(jax.jit(lambda x: x), jnp.zeros(2))
        assert not gc.isenabled()
    finally:
        gc.enable()
