"""One forward pass: encoders that return something else."""

import copy
import dataclasses
import functools

import pytest

from unetr_flax.inference.testing import tiny_config
from unetr_flax.parity.activations import compared_rows, flax_found, forward
from unetr_flax.parity.record import record
from unetr_flax.parity.run_once import run_once
from unetr_flax.parity.twins import make_twins, precise

CFG = tiny_config(2)


@pytest.fixture(scope="module")
def twins():
    with precise():
        return make_twins(CFG, "float64", batch=1)


@pytest.fixture(scope="module")
def tree(twins):
    with precise():
        return run_once(functools.partial(forward, CFG, twins.model), twins.variables, twins.image)


def with_encoder(twins, pack, unpack):
    """Makes twins of somebody's own model, whose encoder packs the features in some way."""
    model = copy.deepcopy(twins.torch_model)
    model.transformer.register_forward_hook(lambda module, args, features: pack(features))
    encode = model.encode
    model.encode = lambda x, mask=None: unpack(encode(x, mask))
    return dataclasses.replace(twins, torch_model=model, own=True)


@pytest.mark.parametrize(
    ("pack", "unpack", "found"),
    [
        (tuple, list, 4),
        (lambda z: {"features": z}, lambda packed: packed["features"], 0),
        (lambda z: (z[-1], z), lambda packed: packed[1], 0),
        (lambda z: [*z, z[0]], lambda packed: packed[:4], 0),
        (lambda z: [x[None] for x in z], lambda packed: [x[0] for x in packed], 0),
    ],
    ids=["tuple", "dict", "pair", "more", "other shapes"],
)
def test_features_of_an_own_encoder_are_left_out_if_it_returns_others(
    twins, tree, pack, unpack, found
):
    own = with_encoder(twins, pack, unpack)
    rows = compared_rows(own, flax_found(CFG, tree))
    assert all(row.ok for row in rows)
    plain = compared_rows(twins, flax_found(CFG, tree))
    assert len(rows) == len(plain) - 4 + found
    assert sum(row.rung == "skip features" for row in rows) == found


def test_the_last_stream_of_an_own_encoder_is_left_out_if_it_returns_something_else(twins):
    own = with_encoder(twins, lambda z: {"features": z}, lambda packed: packed["features"])
    assert record(twins).stream is not None
    assert record(own).stream is None
