import json
import shutil

import jax
import numpy as np
import optax
import pytest

from train.checkpoint import Checkpoints
from train.config import Config
from train.export import export, main, save_model
from train.options import AugmentationOptions, DataOptions
from train.state import create_state
from unetr_flax import UNETR, Preprocessing, Segmenter, UNETRConfig
from unetr_flax.imaging.intensity import Window
from unetr_flax.weights import CheckpointError, load_pretrained, read_metadata

CFG = UNETRConfig.reference(
    (16, 8, 16), 1, 3, 32, patch_size=(16, 8, 16), hidden_size=8, num_layers=4, num_heads=2
)


@pytest.fixture(scope="module")
def state():
    return create_state(UNETR(CFG), optax.adam(1e-3), seed=3)


@pytest.fixture
def run(tmp_path, state):
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save_best(state.replace(step=state.step + 12))
    checkpoints.close()
    dataset = {"name": "Boxes", "labels": ["background", "a", "b"], "modalities": ["CT"]}
    record = {
        "options": Config(
            data=DataOptions(spacing=(1.0, 1.5, 2.0)),
            augmentation=AugmentationOptions(flips=(2, 0)),
        ).to_dict(),
        "model": CFG.to_dict(),
        "dataset": {**dataset, "fingerprint": "0", "validation": []},
    }
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_the_best_model_of_a_run_becomes_a_folder(tmp_path, run, state, capsys):
    folder = tmp_path / "model"
    assert main([str(run), str(folder)]) == 0
    assert "the model of step 12" in capsys.readouterr().out
    cfg, variables = load_pretrained(folder)
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, variables, dict(state.variables))
    metadata = read_metadata(folder)
    assert metadata["preprocessing"] == Preprocessing(
        ("CT",), (Window(-175, 250),), labels=("background", "a", "b"), spacing=(1, 1.5, 2)
    )
    assert metadata["provenance"]["step"] == 12
    assert metadata["provenance"]["flips"] == [0, 2]
    # A second export replaces the folder.
    assert export(run, folder) == 12


def test_a_run_that_is_writing_is_left_alone(tmp_path, run):
    # What orbax is saving, and removes as left over if it may.
    for name in ("last/24", "best/24"):
        (run / "checkpoints" / f"{name}.orbax-checkpoint-tmp").mkdir(parents=True)
    before = sorted(run.rglob("*"))
    assert export(run, tmp_path / "model") == 12
    assert sorted(run.rglob("*")) == before


def test_a_model_of_regions_says_so(tmp_path, run, state):
    record = json.loads((run / "run.json").read_text())
    record["dataset"]["labels"] = ["background", "WT", "TC", "ET"]
    record["dataset"]["region_ids"] = [[1, 2, 3], [2, 3], [3]]
    folder = tmp_path / "model"
    save_model(folder, dict(state.variables), record, 12)
    metadata = read_metadata(folder)
    assert metadata["provenance"]["regions"] == ["WT", "TC", "ET"]
    assert metadata["preprocessing"].labels == ()
    segmenter = Segmenter.from_pretrained(folder)
    assert segmenter.regions.painted == ((0, 1), (1, 2), (2, 3))
    plain = tmp_path / "plain"
    record = json.loads((run / "run.json").read_text())
    record["dataset"]["labels"] = ["background", "a", "b"]
    save_model(plain, dict(state.variables), record, 12)
    with pytest.raises(CheckpointError, match="regions WT, TC, ET"):
        Segmenter.from_pretrained([folder, plain])


def test_a_run_that_has_its_options_in_config_json_is_exported(tmp_path, run):
    (run / "run.json").rename(run / "config.json")
    assert export(run, tmp_path / "model") == 12


def test_without_flips_in_training_there_are_none_to_average(tmp_path, run):
    record = json.loads((run / "run.json").read_text())
    for change in ({"flip_probability": 0.0}, {"flips": []}):
        (run / "run.json").write_text(json.dumps(record | {"options": record["options"] | change}))
        export(run, tmp_path / "model")
        assert read_metadata(tmp_path / "model")["provenance"]["flips"] == []


def test_a_run_without_a_model_is_one_line(tmp_path, run, capsys):
    def says(*args):
        assert main([str(arg) for arg in args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "holds no run" in says(tmp_path / "none", tmp_path / "model")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text((run / "run.json").read_text())
    assert "has not validated yet" in says(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    for path in (run / "checkpoints" / "best" / "12").rglob("ocdbt.process*"):
        shutil.rmtree(path)
    assert "the best checkpoint cannot be read: " in says(run, tmp_path / "model")
    record = json.loads((run / "run.json").read_text())
    record["options"]["spacing"] = 2
    (run / "run.json").write_text(json.dumps(record))
    assert "run.json: spacing=2: must be None or 3 numbers" in says(run, tmp_path / "model")
    (run / "run.json").write_text("{}")
    assert "run.json: 'model'" in says(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
