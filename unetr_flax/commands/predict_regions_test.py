import json
import sys

import jax
import nibabel as nib
import numpy as np
import pytest

from unetr_flax import Preprocessing, cli
from unetr_flax.imaging import Window
from unetr_flax.inference.testing import fake_predictor, tiny_config
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.model.unetr import UNETR
from unetr_flax.weights import save_pretrained

CFG = tiny_config(2)
AFFINE = np.diag([1.0, -2.0, 3.0, 1.0])
NAMES = {"regions": ["outer", "inner"]}


def above(windows):
    """Computes logits of regions that are where the intensity is above 0.5, and above 1.5."""
    return 20 * (2 * windows - np.array([0.5, 1.5]))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Predicts a scan with a model of regions; returns the voxels of the file and the output."""
    scan = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "a.nii")
    calls = []

    def build(models, **options):
        calls.append(options)
        return fake_predictor(above, num_classes=2)

    monkeypatch.setattr("unetr_flax.inference.predictor.Predictor", build)
    variables = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32), abstract_variables(UNETR(CFG))
    )

    def run(provenance, *options):
        save_pretrained(
            tmp_path / "model",
            CFG,
            variables,
            preprocessing=Preprocessing(("CT",), (Window(0, 2),)),
            provenance=provenance,
        )
        paths = [tmp_path / "model", tmp_path / "a.nii", tmp_path / "out"]
        args = ["unetr", "predict", *map(str, paths), *options, "--overwrite"]
        monkeypatch.setattr(sys, "argv", args)
        status, printed = cli.main(), capsys.readouterr()
        assert status == 0, printed.err
        assert calls[-1]["sigmoid"]
        written = nib.load(tmp_path / "out" / "a.nii.gz")
        np.testing.assert_array_equal(written.affine, AFFINE)
        assert written.get_data_dtype() == np.uint8
        return np.asarray(written.dataobj), printed.out

    run.scan, run.out = scan, tmp_path / "out"
    return run


def test_nested_regions_become_a_label_map(run):
    labels, shown = run(NAMES | {"region_ids": [[1, 2], [2]]}, "--probabilities")
    np.testing.assert_array_equal(labels, run.scan)
    assert "regions outer, inner: written as label maps of 1 outer without inner, 2 inner" in shown
    names = {"background": 0, "outer without inner": 1, "inner": 2}
    assert json.loads((run.out / "labels.json").read_text()) == names
    assert f"inner {(run.scan == 2).sum()} voxels" in shown
    probabilities = np.asarray(nib.load(run.out / "a.probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(
        probabilities, 1 / (1 + np.exp(-above(run.scan[..., None] / 2))), rtol=1e-5
    )
    labels, _ = run(NAMES | {"region_ids": [[1, 2], [2]]}, "--roi-subset", "inner")
    np.testing.assert_array_equal(labels, 2 * (run.scan == 2))


def test_regions_are_told_where_the_model_does_not(run, monkeypatch, capsys):
    labels, shown = run(None, "--regions", "outer=1,2", "inner=2")
    np.testing.assert_array_equal(labels, run.scan)
    assert "regions outer, inner: written as label maps of 1 outer without inner, 2 inner" in shown
    masks, _ = run(None, "--regions", "outer", "inner")
    np.testing.assert_array_equal(masks, np.stack([run.scan > 0, run.scan > 1], axis=-1))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--regions", "outer", "--quiet"])
    assert cli.main() == 2
    assert capsys.readouterr().err == (
        "unetr: regions outer: must be 2, one for each output of the model\n"
    )
    run(NAMES)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--regions", "outer", "inner"])
    assert cli.main() == 2
    line = capsys.readouterr().err
    assert line == f"unetr: --regions: {sys.argv[2]} tells itself that it predicts outer, inner\n"


def test_other_regions_become_masks(run):
    expected = np.stack([run.scan > 0, run.scan > 1], axis=-1)
    extras = ("--statistics", "--preview", "--html")
    masks, shown = run(NAMES, *extras)
    np.testing.assert_array_equal(masks, expected)
    assert "regions outer, inner: written as 4D masks, one volume for each region" in shown
    assert f"outer {(run.scan > 0).sum()}, inner {(run.scan > 1).sum()} voxels" in shown
    rows = json.loads((run.out / "a.statistics.json").read_text())
    rows = rows if isinstance(rows, list) else rows["labels"]
    assert [row["voxels"] for row in rows] == [int((run.scan > 0).sum()), int((run.scan > 1).sum())]
    assert (run.out / "a.png").exists()
    assert (run.out / "a.html").exists()
    masks, shown = run(NAMES, "--roi-subset", "outer", "--json")
    np.testing.assert_array_equal(masks, expected * [True, False])
    assert json.loads(shown)["masks"]
    assert json.loads(shown)["cases"][0]["voxels"] == {"1": int((run.scan > 0).sum())}


def test_masks_are_changed_one_by_one(run, tmp_path):
    scan = np.zeros((9, 8, 7), np.float32)
    scan[1:6, 1:6, 1:6] = 2
    scan[3, 3, 3] = 1
    scan[8, 7, 6] = 2
    nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "a.nii")
    inner, outer = scan > 1, scan > 0
    inner[8, 7, 6] = False
    masks, _ = run(NAMES, "--keep-largest", "inner")
    np.testing.assert_array_equal(masks, np.stack([outer, inner], axis=-1))
    masks, _ = run(NAMES, "--keep-largest", "--fill-holes")
    inner[3, 3, 3] = True
    np.testing.assert_array_equal(masks, np.stack([inner, inner], axis=-1))
