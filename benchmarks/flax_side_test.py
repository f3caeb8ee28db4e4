import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.flax_side import plain_modules
from unetr_flax import UNETR, UNETRConfig

SMALL = {"hidden_size": 12, "mlp_dim": 8, "num_heads": 2}
CONFIGS = {
    "reference": UNETRConfig.reference((16, 32, 16), 2, 3, 8, num_layers=4, **SMALL),
    "monai": UNETRConfig.monai((16, 32, 16), 2, 3, feature_size=2, **SMALL),
    "monai, group norm": UNETRConfig.monai(
        (16, 32, 16), 2, 3, feature_size=2, norm_name=("group", {"num_groups": 2}), **SMALL
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_model_in_plain_modules_computes_the_same(name):
    cfg = CONFIGS[name]
    with jax.enable_x64(True):
        image = jnp.asarray(np.random.default_rng(0).standard_normal((2, *cfg.img_size, 2)))
        model = UNETR(cfg, param_dtype=jnp.float64)
        variables = jax.jit(model.init)(jax.random.key(0), image)

        def lowered():
            # A function of its own, as JAX remembers what it traced.
            def run(variables):
                return model.apply(variables, image, train=True, mutable=["batch_stats"])[0]

            return jax.jit(run).lower(variables)

        ours = lowered()
        with plain_modules():
            plain = lowered()
        results = [program.compile()(variables) for program in (ours, plain)]
    np.testing.assert_allclose(*results, rtol=1e-10, atol=1e-10)
    # XLA's own 3D convolutions, and deconvolutions of dilated inputs.
    assert "lhs_dilate" in plain.as_text()
    assert "lhs_dilate" not in ours.as_text()
