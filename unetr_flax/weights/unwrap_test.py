import collections

import numpy as np
import pytest

from unetr_flax.weights import CheckpointError
from unetr_flax.weights.unwrap import unwrap

# The keys of a registered family, and those of an unknown model.
BARE = {"vit.blocks.0.norm1.weight": np.ones(3), "out.conv.bias": np.zeros(2)}
UNKNOWN = {"a.weight": np.ones(3), "b.bias": np.zeros(2)}
LIGHTNING = {"epoch": 7, "optimizer": {"state": {0: np.ones(3)}}, "hyper_parameters": {"lr": 0.1}}
COUNT = np.array(7)


def prefixed(prefix, state_dict=BARE):
    return {prefix + key: value for key, value in state_dict.items()}


def assert_bare(state_dict):
    assert list(state_dict) == list(BARE)
    assert all(state_dict[key] is BARE[key] for key in BARE)


@pytest.mark.parametrize(
    ("obj", "description"),
    [
        (BARE, "state dict"),
        (collections.OrderedDict(BARE), "state dict"),
        ({"state_dict": BARE, **LIGHTNING}, "state_dict of a checkpoint"),
        ({"model": BARE, "optimizer": {}}, "model of a checkpoint"),
        ({"model_state_dict": BARE, "loss": 0.5}, "model_state_dict of a checkpoint"),
        ({"net": BARE}, "net of a checkpoint"),
        ({"module": BARE, "lr": 0.5}, "module of a checkpoint"),
        ({"model": {"state_dict": BARE}, "epoch": 1}, "state_dict of model of a checkpoint"),
        ({"state_dict": BARE, "model": "UNETR"}, "state_dict of a checkpoint"),
        (prefixed("module."), "state dict, prefix 'module.' removed"),
        (prefixed("_forward_module."), "state dict, prefix '_forward_module.' removed"),
        (prefixed("a.b.my_unetr."), "state dict, prefix 'a.b.my_unetr.' removed"),
        (
            {"state_dict": prefixed("module.model.net."), **LIGHTNING},
            "state_dict of a checkpoint, prefix 'module.model.net.' removed",
        ),
        ({**BARE, "epoch": 7}, "state dict, 1 counter dropped"),
        (
            {"n_averaged": COUNT, **prefixed("module."), "module.n.num_batches_tracked": COUNT},
            "state dict, prefix 'module.' removed, 2 counters dropped",
        ),
        (
            {"model": {**prefixed("net."), "net.epoch": COUNT}, "epoch": 3},
            "model of a checkpoint, prefix 'net.' removed, 1 counter dropped",
        ),
    ],
)
def test_finds_the_bare_state_dict(obj, description):
    state_dict, words = unwrap(obj)
    assert words == description
    assert_bare(state_dict)


def test_no_prefix_is_removed_from_the_names_of_an_unknown_model():
    obj = prefixed("module.", UNKNOWN)
    assert unwrap(obj) == (obj, "state dict")


@pytest.mark.parametrize(
    ("obj", "ignore", "description"),
    [
        ({**BARE, "loss.weight": COUNT}, ["loss.*"], "state dict, 1 key ignored"),
        (
            {**prefixed("model."), "loss.a": COUNT, "model.loss.b": COUNT, "metric": COUNT},
            ["loss.*", "metric"],
            "state dict, prefix 'model.' removed, 3 keys ignored",
        ),
        (
            {**prefixed("student."), **prefixed("teacher.")},
            ["teacher.*"],
            "state dict, prefix 'student.' removed, 2 keys ignored",
        ),
        # Entries that are no arrays, and a counter that a pattern matches too.
        (
            {**BARE, "best": "never", "head.epoch": 3, "epoch": 4},
            ["best", "head.*"],
            "state dict, 1 counter dropped, 2 keys ignored",
        ),
        ({"net": {**BARE, "ema": {}}}, ["ema"], "net of a checkpoint, 1 key ignored"),
    ],
)
def test_named_extras_are_ignored_and_counted(obj, ignore, description):
    state_dict, words = unwrap(obj, ignore)
    assert words == description
    assert_bare(state_dict)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["los.*"], "ignore: 'los.*' matches no key"),
        (["loss.*", "vit"], "ignore: 'vit' matches no key"),
        (["LOSS.*"], "ignore: 'LOSS.*' matches no key"),
        (["*"], "holds nothing"),
    ],
)
def test_patterns_that_cannot_be_meant(ignore, message):
    with pytest.raises(CheckpointError) as error:
        unwrap({**BARE, "loss.weight": COUNT}, ignore)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (None, "object of type NoneType, must be arrays by name"),
        ([BARE], "object of type list"),
        (np.ones(3), "object of type ndarray"),
        ({}, "holds nothing"),
        ({"state_dict": {}}, "state_dict: holds nothing"),
        ({"epoch": 7}, "holds nothing"),
        ({**BARE, "best": 7}, "entry 'best' is of type int"),
        ({"state_dict": {**BARE, "best": 7}}, "state_dict: entry 'best' is of type int"),
        ({**BARE, "epoch": "last"}, "entry 'epoch' is of type str"),
        ({**BARE, 3: np.ones(3)}, "key 3 is no string"),
        ({"weights": BARE}, "entry 'weights' is of type dict"),
        ({"model": BARE, "net": BARE}, "state dicts under model and net, there must be one"),
        ({"model": {"model": {"model": BARE}}}, "model: entry 'model' is of type dict"),
        (
            {**prefixed("model."), "loss_function.weight": np.ones(3), "metrics.n": np.ones(3)},
            "beside the model's keys model.* there are loss_function.weight, metrics.n; ignore "
            "them if they are no part of the model (--ignore 'loss_function.*')",
        ),
        (
            {**prefixed("model."), **{f"criterion.{i}": np.ones(1) for i in range(9)}},
            "criterion.3 and 5 more; ignore",
        ),
        ({**prefixed("module."), "module.": COUNT}, "there are module.; ignore"),
        (
            {**prefixed("student."), **prefixed("teacher.")},
            "models behind 'student.' and 'teacher.', there must be one; ignore the others "
            "(--ignore 'teacher.*')",
        ),
        ({**BARE, **prefixed("ema.")}, "models behind '' and 'ema.'"),
        ({**BARE, "x" * 500: 7}, "xxx... is of type int"),
    ],
)
def test_tells_what_is_wrong_in_one_line(obj, message):
    with pytest.raises(CheckpointError) as error:
        unwrap(obj)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 250
