"""Settings for the tests of training."""

import os

import numpy as np
import pytest

import train.program
import train.run
from train.data.testing import write_boxes
from train.stand_in import Small


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Keeps prepared cases out of the home folder of whoever runs the tests."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the model by a small one, since these tests are about the flow of a run."""
    monkeypatch.setattr(train.program, "UNETR", Small)

    def save(folder, variables, record, step):
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(step))

    monkeypatch.setattr(train.run, "save_model", save)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Boxes that are brighter than the rest, so that even the stand-in finds them.

    Each has a dark face, so that the cases' Dice differ.
    """
    rng = np.random.default_rng(0)
    cases = []
    for i in range(5):
        label = np.zeros((18 + i, 30 + i, 17), np.uint8)
        label[4 : 9 + i, 6:22, 3 : 12 - i] = 1
        bright = label * (np.arange(len(label)) > 4)[:, None, None]
        image = (bright * 300.0 + rng.normal(0, 20, label.shape)).astype(np.int16)
        cases.append((image, label))
    folder = tmp_path_factory.mktemp("data") / "Task00_Boxes"
    return write_boxes(folder, cases, affine=np.diag([1.0, 1.0, 2.0, 1.0]))
