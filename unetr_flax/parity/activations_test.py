"""One forward pass: encoders that return something else, and logits as predicted."""

import copy
import dataclasses
import functools
from unittest import mock

import pytest

from unetr_flax.inference.testing import tiny_config
from unetr_flax.ops.attention import cpu
from unetr_flax.parity.activations import activation_rows, compared_rows, flax_found, forward
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
    """What the Flax model computes, with attention in blocks as if there were many patches."""
    with precise(), mock.patch.object(cpu, "MIN_KEYS", 1):
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


def test_logits_are_compared_as_predictions_compute_them(twins, tree):
    rows = compared_rows(twins, flax_found(CFG, tree))
    assert [row.name for row in rows[-2:]] == ["logits", "logits, as predicted"]
    assert all(row.ok for row in rows)


def test_an_error_in_the_form_that_predictions_use_is_noticed(twins):
    attend = cpu._attend

    def wrong(*heads, scale):
        return attend(*heads, scale=2 * scale)

    with precise(), mock.patch.multiple(cpu, MIN_KEYS=1, _attend=wrong):
        rows = activation_rows(twins)
    assert [row.name for row in rows if not row.ok] == ["logits, as predicted"]
