"""Scores of many classes, some of which are predicted nowhere."""

import numpy as np
import pytest
import torch

from parity_tests.volume_to_score import _labels, _score_rows
from unetr_flax.parity.twins import channels_first

# MONAI warns of classes without voxels, and of deprecated arguments that it passes itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the prediction of class"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NUM_CLASSES = 14
SHAPE = (6, 7, 8)


@pytest.fixture
def labels():
    return _labels(np.random.default_rng(0), SHAPE, NUM_CLASSES)


@pytest.fixture
def logits():
    """Logits of which two classes are nowhere the largest."""
    logits = np.random.default_rng(1).standard_normal((1, *SHAPE, NUM_CLASSES))
    logits[..., [3, 7]] = -9
    return logits


def test_each_of_many_classes_occurs(labels):
    counts = np.bincount(labels.ravel())
    assert labels.shape == (1, *SHAPE)
    assert counts.shape == (NUM_CLASSES,)
    assert np.ptp(counts) <= 1


def test_classes_that_neither_side_predicts_are_no_difference(logits, labels):
    theirs = torch.from_numpy(channels_first(logits))
    dice, hd95 = _score_rows(logits, theirs, labels)
    assert dice.shape == (NUM_CLASSES - 1,)
    assert hd95.shape == (NUM_CLASSES - 3,)
    assert dice.ok
    assert hd95.ok


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_class_that_one_side_predicts_is_a_difference(logits, labels, side):
    # Outside of its label, so that its Dice stays 0.
    other = logits.copy()
    other[0, *np.argwhere(labels[0] != 3)[0], 3] = 99
    ours, theirs = (other, logits) if side == "ours" else (logits, other)
    _, hd95 = _score_rows(ours, torch.from_numpy(channels_first(theirs)), labels)
    assert hd95.shape == (NUM_CLASSES - 2,)
    assert not hd95.ok


def test_logits_that_are_not_finite_do_not_hold(logits, labels):
    nothing = np.full_like(logits, np.nan)
    _, hd95 = _score_rows(nothing, torch.from_numpy(channels_first(nothing)), labels)
    assert not hd95.ok
