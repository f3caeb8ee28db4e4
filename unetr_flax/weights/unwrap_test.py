import collections

import numpy as np
import pytest

from unetr_flax.weights.unwrap import CheckpointError, unwrap

BARE = {"a.weight": np.ones(3), "b.bias": np.zeros(2)}
LIGHTNING = {"epoch": 7, "optimizer": {"state": {0: np.ones(3)}}, "hyper_parameters": {"lr": 0.1}}


def prefixed(prefix):
    return {prefix + key: value for key, value in BARE.items()}


@pytest.mark.parametrize(
    ("obj", "description"),
    [
        (BARE, "state dict"),
        (collections.OrderedDict(BARE), "state dict"),
        ({"state_dict": BARE, **LIGHTNING}, "state_dict of a checkpoint"),
        ({"model": BARE, "optimizer": {}}, "model of a checkpoint"),
        ({"model_state_dict": BARE, "loss": 0.5}, "model_state_dict of a checkpoint"),
        ({"net": BARE}, "net of a checkpoint"),
        ({"model": {"state_dict": BARE}, "epoch": 1}, "state_dict of model of a checkpoint"),
        ({"state_dict": BARE, "model": "UNETR"}, "state_dict of a checkpoint"),
        (prefixed("module."), "state dict, prefix 'module.' removed"),
        (prefixed("_model."), "state dict, prefix '_model.' removed"),
        (prefixed("network._orig_mod."), "state dict, prefixes 'network.' '_orig_mod.' removed"),
        (
            {"state_dict": prefixed("module.model.net."), **LIGHTNING},
            "state_dict of a checkpoint, prefixes 'module.' 'model.' 'net.' removed",
        ),
    ],
)
def test_finds_the_bare_state_dict(obj, description):
    state_dict, words = unwrap(obj)
    assert words == description
    assert list(state_dict) == list(BARE)
    assert all(state_dict[key] is BARE[key] for key in BARE)


def test_a_prefix_of_some_keys_is_part_of_their_names():
    obj = {**prefixed("model."), "head.weight": np.ones(3)}
    assert unwrap(obj) == (obj, "state dict")


def test_a_prefix_is_not_a_whole_name():
    obj = {"module.": np.ones(3), "module.weight": np.ones(3)}
    assert unwrap(obj) == (obj, "state dict")


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (None, "object of type NoneType, must be arrays by name"),
        ([BARE], "object of type list"),
        (np.ones(3), "object of type ndarray"),
        ({}, "holds nothing"),
        ({"state_dict": {}}, "state_dict: holds nothing"),
        ({**BARE, "epoch": 7}, "entry 'epoch' is of type int"),
        ({"state_dict": {**BARE, "epoch": 7}}, "state_dict: entry 'epoch' is of type int"),
        ({**BARE, 3: np.ones(3)}, "key 3 is no string"),
        ({"weights": BARE}, "entry 'weights' is of type dict"),
        ({"model": BARE, "net": BARE}, "state dicts under model and net, there must be one"),
        ({"model": {"model": {"model": BARE}}}, "model: entry 'model' is of type dict"),
        (
            {**prefixed("model."), "loss_function.weight": np.ones(3), "metrics.n": np.ones(3)},
            "beside the model's keys model.* there are loss_function.weight, metrics.n; remove",
        ),
        (
            {**prefixed("model."), **{f"criterion.{i}": np.ones(1) for i in range(9)}},
            "criterion.3 and 5 more; remove",
        ),
        ({**BARE, "x" * 500: 7}, "xxx... is of type int"),
    ],
)
def test_tells_what_is_wrong_in_one_line(obj, message):
    with pytest.raises(CheckpointError) as error:
        unwrap(obj)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 250
