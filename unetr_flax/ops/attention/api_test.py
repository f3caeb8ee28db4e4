import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # what JAX looks at for a cuDNN

from unetr_flax import UNETR, UNETRConfig, ops
from unetr_flax.ops.attention import api as attention

SHAPE = (2, 6, 3, 8)
SCALE = 0.2


def heads(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, SHAPE, jnp.float32).astype(dtype) for key in keys]


def definition(query, key, value, mask=None):
    """The formula in float64, query by query."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(SHAPE)
    for b, n, h in np.ndindex(SHAPE[:3]):
        energy = key[b, :, h] @ query[b, n, h] * SCALE
        seen = np.ones(SHAPE[1], bool) if mask is None else mask[b, h, n]
        weights = np.where(seen, np.exp(energy), 0)
        out[b, n, h] = weights / weights.sum() @ value[b, :, h]
    return out


@pytest.fixture
def cuda(monkeypatch):
    """A process with a GPU and a cuDNN, as far as choosing and lowering go."""
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(attention, "cuda_devices", lambda: [device])
    monkeypatch.setattr(attention, "cudnn_version", lambda: (9, 15, 0))
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91500)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    return device


def lowered_for(platform, function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(dtype, tolerance, masked):
    query, key, value = heads(dtype)
    mask = np.random.default_rng(0).random((2, 3, 6, 6)) < 0.5 if masked else None
    if masked:
        mask |= np.eye(6, dtype=bool)  # nobody is blind
    out = ops.dot_product_attention(query, key, value, mask, scale=SCALE)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float64), definition(query, key, value, mask), rtol=0, atol=tolerance
    )
    weights = ops.attention_weights(query, key, mask, scale=SCALE)
    assert weights.shape == (2, 3, 6, 6)
    assert np.array_equal(ops.weighted_values(weights, value), out)


@pytest.mark.usefixtures("cuda")
def test_other_platforms_compute_the_same_in_a_process_with_cuda():
    arguments = heads("bfloat16")

    def gradients(attend):
        def loss(*arguments):
            return (attend(*arguments, scale=SCALE).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))

    theirs = gradients(attention._by_products)(*arguments)
    ours = gradients(ops.dot_product_attention)
    for gradient in (ours, jax.jit(ours)):
        for a, b in zip(gradient(*arguments), theirs, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("cuda")
def test_cuda_gets_cudnn_with_its_gradient_and_the_scale():
    arguments = heads("bfloat16")

    def attend(*arguments):
        return ops.dot_product_attention(*arguments, scale=SCALE)

    def gradient(*arguments):
        return jax.grad(lambda *a: attend(*a).sum().astype(jnp.float32), (0, 1, 2))(*arguments)

    program = lowered_for("cuda", attend, *arguments)
    assert "__cudnn$fmhaSoftmax" in program
    assert f"fmha_scale\\22: {SCALE}" in program
    assert "dot_general" not in program
    program = lowered_for("cuda", gradient, *arguments)
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert "dot_general" not in program
    for platform in ("cpu", "tpu"):
        assert "cudnn" not in lowered_for(platform, gradient, *arguments)


def test_cudnn_is_chosen_only_where_it_can(cuda, monkeypatch):
    def chosen(dtype=jnp.bfloat16, size=96, version=(9, 15, 0), capability="9.0"):
        cuda.compute_capability = capability
        monkeypatch.setattr(attention, "cudnn_version", lambda: version)
        return attention._cudnn_can(jax.ShapeDtypeStruct((2, 6, 3, size), dtype))

    assert chosen()
    assert chosen(jnp.float16)
    assert chosen(capability="8.0")
    assert chosen(capability="12.0")
    assert not chosen(jnp.float32)
    assert not chosen(size=100)
    assert not chosen(size=136)
    assert not chosen(version=None)
    assert not chosen(capability="7.5")
    assert not chosen(capability="10.3", version=(9, 10, 2))
    monkeypatch.setattr(attention, "cuda_devices", lambda: [])
    assert not chosen()


# Flax's LayerNorm itself relies on promotion for mixed precision.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.usefixtures("cuda")
def test_masks_weights_and_dropout_do_without_cudnn():
    cfg = UNETRConfig.reference((16, 32, 16), 1, 2, hidden_size=16, num_heads=2, num_layers=4)
    dropping = UNETRConfig.from_dict({**cfg.to_dict(), "dropout_rate": 0.5})
    image = jnp.zeros((2, *cfg.img_size, 1))
    variables = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), image)

    def program(cfg, train=False, **how):
        model = UNETR(cfg, dtype=jnp.bfloat16)
        rngs = {"dropout": jax.random.key(0)}

        def apply(variables):
            mutable = ["batch_stats"] if train else False
            return model.apply(variables, image, train=train, rngs=rngs, mutable=mutable, **how)

        return lowered_for("cuda", apply, variables)

    assert "cudnn" in program(cfg)
    assert "cudnn" in program(cfg, train=True)
    assert "cudnn" in program(dropping)
    assert "cudnn" not in program(dropping, train=True)
    assert "cudnn" not in program(cfg, return_attention=True)
    assert "cudnn" not in program(cfg, mask=jnp.ones((1, 1, 2, 2), bool))


def test_programs_are_exported_for_platforms_that_are_not_here():
    arguments = heads("bfloat16")
    attend = jax.jit(functools.partial(ops.dot_product_attention, scale=SCALE))
    exported = jax.export.export(attend, platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert np.array_equal(exported.call(*arguments), attend(*arguments))
