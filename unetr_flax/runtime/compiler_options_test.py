import jax
import jax.numpy as jnp
import pytest

from unetr_flax.runtime import compiler_options as module
from unetr_flax.runtime.compiler_options import compiler_options, options_to_run_once


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_the_installed_xla_knows_the_options_of_cpus():
    options = compiler_options("cpu")
    assert options == module._OPTIONS["cpu"]
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(3)).sum() == 6


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    known = {"xla_backend_optimization_level": 1}
    monkeypatch.setitem(module._OPTIONS, "cpu", {**known, "xla_of_another_time": True})
    assert compiler_options("cpu") == known


def test_programs_that_run_once_are_not_optimized():
    options = options_to_run_once("cpu")
    assert options == {"xla_backend_optimization_level": 0}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(3)).sum() == 6


def test_other_platforms_have_none():
    assert compiler_options("tpu") == compiler_options("gpu") == {}
    assert options_to_run_once("tpu") == options_to_run_once("gpu") == {}
    assert compiler_options() == compiler_options(jax.default_backend())


def test_flags_of_the_environment_hold(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert "xla_backend_optimization_level" not in compiler_options("cpu")
