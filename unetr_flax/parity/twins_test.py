import jax
import numpy as np
import pytest
import torch

from unetr_flax.inference.testing import tiny_config
from unetr_flax.parity.twins import make_twins, precise

CFG = tiny_config(2)


@pytest.fixture(scope="module")
def wide():
    with precise():
        return make_twins(CFG, "float64", batch=1)


def test_twins_cast_to_another_dtype_are_those_made_in_it(wide):
    cast = wide.astype("float32")
    made = make_twins(CFG, "float32", batch=1)
    assert cast.dtype == made.dtype == "float32"
    assert cast.model == made.model
    assert np.array_equal(cast.image, made.image)
    assert cast.image.dtype == np.float32
    leaves = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), cast.variables, made.variables
    )
    assert all(jax.tree.leaves(leaves))
    ours, theirs = (twins.torch_model.state_dict() for twins in (cast, made))
    assert ours.keys() == theirs.keys()
    assert all(
        value.dtype == theirs[key].dtype and torch.equal(value, theirs[key])
        for key, value in ours.items()
    )
    assert not cast.torch_model.training


def test_casting_leaves_the_twins_as_they_are(wide):
    wide.astype("float32")
    assert {p.dtype for p in wide.torch_model.parameters()} == {torch.float64}
    assert {x.dtype for x in jax.tree.leaves(wide.variables)} == {np.dtype("float64")}
