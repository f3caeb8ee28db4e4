"""Settings of JAX for all tests."""

import gc
import os

# JAX reads these when it is imported. Compiling is most of a test's time and each program runs
# once, so XLA does not optimize.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Tests neither keep compiled programs on disk nor read those of other runs.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

import flax.linen as nn
import jax
import optax
import pytest

# Tracing makes millions of objects; searching them for garbage is a fifth of its time.
gc.set_threshold(100_000, 10, 10)


@pytest.fixture(autouse=True)
def strict_promotion(monkeypatch):
    """Makes implicit promotion of dtypes an error; with it a model would not stay in float64.

    Flax's norms (in float64 and bfloat16) and optax's Adam promote inside, so they alone keep JAX's
    standard rules.
    """
    standard = jax.numpy_dtype_promotion("standard")
    for norm in (nn.LayerNorm, nn.BatchNorm, nn.GroupNorm):
        monkeypatch.setattr(norm, "__call__", standard(norm.__call__))
    monkeypatch.setattr(optax.tree, "bias_correction", standard(optax.tree.bias_correction))
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def compiled():
    """Names of what jax compiles during the test."""
    names = []

    def listen(event, duration, fun_name="", **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
