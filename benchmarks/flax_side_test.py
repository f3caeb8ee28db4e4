from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.flax_side import FlaxSide
from unetr_flax import UNETRConfig
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.parity.twins import randomize

SIZE = (16, 32, 16)
SMALL = {"hidden_size": 12, "mlp_dim": 8, "num_heads": 2}
CONFIGS = (
    UNETRConfig.reference(SIZE, 2, 3, 8, num_layers=4, **SMALL),
    UNETRConfig.monai(SIZE, 2, 3, feature_size=2, **SMALL),
)


def lowered_forward(side):
    """Returns the program of a side's forward pass before XLA optimizes it."""
    return side._functions["forward"].lower(*side._arguments("forward")).as_text()


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.family)
def test_plain_definitions_compute_the_same_in_xlas_own_operations(cfg):
    torch_model = torch_model_of(cfg).double()
    randomize(torch_model, seed=0)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, *SIZE, 2))
    labels = rng.integers(0, 3, (2, *SIZE), np.int32)
    given = (SimpleNamespace(cfg=cfg, dtype="float64"), torch_model.state_dict(), image, labels)
    # The parameters that a norm does not have are ones and zeros in float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        sides = [FlaxSide(*given, 1e-4, lowering=lowering) for lowering in ("auto", "xla")]
        ours, plain = (lowered_forward(side) for side in sides)
        logits = [side.forward() for side in sides]
    assert logits[0].dtype == np.float64
    np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-10)
    # XLA's own convolutions, and deconvolutions of inputs dilated by zeros.
    assert "lhs_dilate" in plain
    assert "lhs_dilate" not in ours
