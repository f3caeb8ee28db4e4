"""The model as it is lowered for TPU, run on CPU, against the model as it is lowered there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import UNETR, UNETRConfig, ops
from unetr_flax.ops import in_place_tpu, slabs_tpu


def config(family):
    options = {"hidden_size": 16, "num_heads": 2}
    if family == "monai":
        return UNETRConfig.monai((16, 16, 32), 2, 3, feature_size=2, mlp_dim=32, **options)
    return UNETRConfig.reference((16, 16, 32), 2, 3, light_r=32, num_layers=4, **options)


@pytest.mark.parametrize("family", ["reference", pytest.param("monai", marks=pytest.mark.slow)])
def test_the_tpu_s_program_computes_the_same_gradients(monkeypatch, family):
    """With `remat`, and what is large cut into parts."""
    cfg = config(family)
    norms_in_slabs = []
    own = slabs_tpu._own

    def spy(x, start, size):
        norms_in_slabs.append(isinstance(x, ops.Normalized))
        return own(x, start, size)

    monkeypatch.setattr(slabs_tpu, "_own", spy)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = UNETR(cfg, param_dtype=jnp.float64, remat=True)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *cfg.img_size, 2)))
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            given = {**variables, "params": params}
            logits, updated = model.apply(given, x, train=True, mutable=["batch_stats"])
            return jnp.square(jnp.sin(logits)).mean(), updated

        def results(platform):
            gradients = ops.traced_for(platform)(jax.value_and_grad(loss, has_aux=True))
            return jax.jit(gradients)(variables["params"])

        expected = results("cpu")
        monkeypatch.setattr(slabs_tpu, "SLAB_BYTES", 2**18)
        monkeypatch.setattr(in_place_tpu, "PART_BYTES", 2**16)
        found = results("tpu")
    assert any(norms_in_slabs) == (family == "reference")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Biases before norms have no gradient but rounding.
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * largest)
