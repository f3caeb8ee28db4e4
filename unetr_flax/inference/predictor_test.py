import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.inference.predictor import (
    Predictor,
    Weights,
    logits_of_mean,
    probabilities_of,
    windows_per_device,
)
from unetr_flax.inference.testing import tiny_config
from unetr_flax.runtime import cudnn
from unetr_flax.runtime.cudnn import CudnnError


@pytest.mark.parametrize("sigmoid", [False, True])
def test_logits_of_a_mean_have_the_mean_of_the_probabilities(sigmoid):
    logits = np.random.default_rng(0).normal(0, 4, (3, 1, 4, 3, 2, 5)).astype(np.float32)
    shares = [probabilities_of(one, axes=(1, 3), sigmoid=sigmoid) for one in logits]
    activation = jax.nn.sigmoid if sigmoid else jax.nn.softmax
    expected = np.mean([activation(np.flip(one, (1, 3))) for one in logits], axis=0)
    found = activation(logits_of_mean(jnp.sum(jnp.array(shares), 0), count=3, sigmoid=sigmoid))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_certain_regions_have_finite_logits():
    certain = jnp.array([[-1000.0, 1000.0]])
    total = probabilities_of(certain, axes=(), sigmoid=True)
    found = logits_of_mean(total, count=1, sigmoid=True)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(jax.nn.sigmoid(found), [[0, 1]], atol=1e-7)


@pytest.mark.parametrize(
    ("platform", "edges", "expected"),
    [
        ("cpu", (16, 24, 32, 40, 96), [16, 4, 2, 1, 1]),
        ("gpu", (16, 96, 160, 192, 224, 512), [4, 4, 4, 2, 1, 1]),
    ],
)
def test_small_windows_are_given_together(platform, edges, expected):
    assert [windows_per_device(platform, (n, n, n)) for n in edges] == expected


def test_a_gpu_with_a_wrong_cudnn_is_refused_in_16_bits(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(cudnn, "cuda_devices", lambda: [gpu])
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: (9, 10, 2))
    models = [Weights(tiny_config(2), {})]
    with pytest.raises(CudnnError, match=r"^cuDNN 9\.10\.2: computes wrong 3D convolutions in bfl"):
        Predictor(models, dtype=jnp.bfloat16, devices=[gpu])
    Predictor(models, dtype=jnp.bfloat16, devices=jax.devices("cpu")[:1])
