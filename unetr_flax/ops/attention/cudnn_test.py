import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from unetr_flax import UNETR, UNETRConfig, ops
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.ops.attention import cudnn, xla

SHAPE = (2, 6, 3, 8)
SCALE = 0.2


def heads(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, SHAPE, jnp.float32).astype(dtype) for key in keys]


@pytest.fixture
def cuda(monkeypatch):
    """Simulates a process with a GPU and cuDNN for choosing and lowering."""
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(cudnn, "cuda_devices", lambda: [device])
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: (9, 15, 0))
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91500)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    return device


def lowered_for(platform, function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("cuda")
def test_other_platforms_compute_the_same_in_a_process_with_cuda():
    arguments = heads("bfloat16")

    def gradients(attend):
        def loss(*arguments):
            return (attend(*arguments, scale=SCALE).astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))

    theirs = gradients(xla.dot_product_attention)(*arguments)
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
        monkeypatch.setattr(cudnn, "cudnn_version", lambda: version)
        return cudnn.is_available(jax.ShapeDtypeStruct((2, 6, 3, size), dtype))

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
    with ops.exportable():
        assert not chosen()
    assert chosen()
    monkeypatch.setattr(cudnn, "cuda_devices", lambda: [])
    assert not chosen()


# In evaluation, the decoder's BatchNorm promotes bfloat16 with its statistics.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.usefixtures("cuda")
def test_masks_weights_and_dropout_do_without_cudnn():
    cfg = UNETRConfig.reference((16, 32, 16), 1, 2, hidden_size=16, num_heads=2, num_layers=4)
    dropping = UNETRConfig.from_dict({**cfg.to_dict(), "dropout_rate": 0.5})
    image = jnp.zeros((2, *cfg.img_size, 1))
    variables = abstract_variables(UNETR(cfg))

    def program(cfg, train=False, lowering="auto", **how):
        model = UNETR(cfg, dtype=jnp.bfloat16, lowering=lowering)
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
    assert "cudnn" not in program(cfg, lowering="xla")
    with ops.exportable():
        assert "cudnn" not in program(cfg)
