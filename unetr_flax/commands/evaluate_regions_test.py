import json
import re

import numpy as np
import pytest

from unetr_flax.commands.testing import LABEL, MISSED, SPACING, command, save
from unetr_flax.evaluation.scores import evaluate_case

pytest.importorskip("nibabel")
pytest.importorskip("scipy")


@pytest.fixture
def run(monkeypatch, capsys):
    return command(monkeypatch, capsys, "evaluate")


# The whole, and a part of it.
REGIONS = {"whole": (1, 2), "part": (2,)}
OPTION = ("--regions", "whole=1,2", "part=2")


def masks(labels):
    return np.stack([np.isin(labels, ids) for ids in REGIONS.values()], -1).astype(np.uint8)


def scored(folder):
    """Reads mean scores and names from a report, by number of the structure."""
    content = json.loads((folder / "out.json").read_text())
    return content["cases"]["prediction"], content


def expected():
    return {
        str(number): evaluate_case(
            masks(MISSED)[..., number - 1], masks(LABEL)[..., number - 1], SPACING, ids={1}
        )[1]
        for number in (1, 2)
    }


@pytest.mark.parametrize(
    ("prediction", "label", "options"),
    [
        (masks(MISSED), masks(LABEL), ()),
        (masks(MISSED), masks(LABEL), OPTION),
        (masks(MISSED), LABEL, OPTION),
        (MISSED, masks(LABEL), OPTION),
        (MISSED, LABEL, OPTION),
    ],
)
def test_masks_and_regions_have_the_scores_of_their_structures(
    run, tmp_path, prediction, label, options
):
    files = save(tmp_path / "prediction.nii.gz", prediction), save(tmp_path / "label.nii", label)
    (tmp_path / "labels.json").write_text('["background", "whole", "part"]')
    status, out, err = run(*files, *options, "--json", tmp_path / "out.json")
    assert (status, err) == (0, "")
    assert "whole" in out
    assert "part" in out
    found, _ = scored(tmp_path)
    for number, scores in expected().items():
        assert found[number]["dice"] == pytest.approx(scores.dice)
        assert found[number]["label_ml"] == pytest.approx(scores.label_ml)
    assert 0 < found["1"]["dice"] < 1
    assert found["2"]["dice"] == 0


def test_regions_of_a_file_of_labels_are_scored(run, tmp_path):
    labels = {"background": 0, "whole": [1, 2], "part": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    files = save(tmp_path / "prediction.nii", MISSED), save(tmp_path / "label.nii", LABEL)
    outputs = ("--json", tmp_path / "out.json", "--worst", 1, tmp_path / "worst")
    assert run(*files, "--labels", tmp_path / "dataset.json", *outputs)[0] == 0
    found, content = scored(tmp_path)
    assert [label["name"] for label in content["labels"].values()] == ["whole", "part"]
    assert found["1"]["dice"] == pytest.approx(expected()["1"].dice)


@pytest.mark.parametrize("beside", [True, False])
def test_voxels_of_the_ignored_label_count_in_no_score(run, tmp_path, beside):
    """The prediction is right but where the true label is ignored, and has that label nowhere."""
    prediction = np.where(LABEL == 2, 1, LABEL).astype(np.uint8)
    files = save(tmp_path / "prediction.nii", prediction), save(tmp_path / "label.nii", LABEL)
    names = tmp_path / ("labels.json" if beside else "dataset.json")
    names.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "ignore": 2}}))
    options = () if beside else ("--labels", names)
    status, out, err = run(*files, *options, "--json", tmp_path / "out.json")
    assert (status, err) == (0, "")
    assert "true label is the ignored one, 2, count in no score" in out
    found, content = scored(tmp_path)
    assert list(found) == ["1"]
    assert (found["1"]["dice"], found["1"]["hd95_mm"]) == (1, 0)
    assert found["1"]["prediction_ml"] == found["1"]["label_ml"]
    assert (content["ignored_label"], content["not_scored"]) == (2, [])


def test_masks_that_are_not_scored_are_told(run, tmp_path):
    files = [save(tmp_path / name, masks(LABEL)) for name in ("p.nii", "l.nii")]
    (tmp_path / "names.json").write_text('{"2": "part"}')
    status, out, err = run(*files, "--labels", tmp_path / "names.json")
    assert status == 0
    assert re.search(r"part +1  1\.000 ", out)
    assert err == "unetr: labels 1: occur, but are not in --labels\n"


def test_worst_cases_of_masks_are_drawn(run, tmp_path):
    files = save(tmp_path / "p.nii", masks(MISSED)), save(tmp_path / "l.nii", LABEL)
    status, _, err = run(*files, *OPTION, "--worst", 1, tmp_path / "worst")
    assert (status, err) == (0, "")
    assert [path.name for path in (tmp_path / "worst").iterdir()] == ["worst_01_p.png"]


def test_long_names_of_any_letters_are_cut_to_what_file_systems_hold(run, tmp_path):
    folders = tmp_path / "predictions", tmp_path / "labels"
    for folder, array in zip(folders, (masks(MISSED), masks(LABEL)), strict=True):
        save(folder / ("\u2202" * 60) / ("\u2211" * 60 + "b.nii"), array)
    status, _, err = run(*folders, "--worst", 1, tmp_path / "worst")
    assert (status, err) == (0, "")
    (picture,) = (tmp_path / "worst").iterdir()
    assert picture.name == "worst_01_" + "\u2211" * 39 + "b.png"


@pytest.mark.parametrize(
    ("prediction", "label", "options", "message"),
    [
        (masks(LABEL), LABEL, (), "l.nii: a label map, beside a file of masks; --regions"),
        (LABEL, masks(LABEL), (), "p.nii: a label map, beside a file of masks; --regions"),
        (masks(LABEL), masks(LABEL)[..., :1].repeat(3, -1), (), "p.nii: 2 masks, must be the 3 of"),
        (masks(LABEL), LABEL, ("--regions", "a=1"), "p.nii: 2 masks, must be the 1 of --regions"),
        (2 * masks(LABEL), masks(LABEL), (), "p.nii: masks from 0 to 2, must be 0 and 1"),
        (LABEL, LABEL, ("--regions", "a"), "--regions a: must be NAME=ID,ID,..."),
        (LABEL, LABEL, ("--labels", "x.json", *OPTION), "--regions: excludes --labels"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, tmp_path, prediction, label, options, message):
    (tmp_path / "x.json").write_text('["background", "a"]')
    options = [str(tmp_path / o) if o == "x.json" else o for o in options]
    files = save(tmp_path / "p.nii", prediction), save(tmp_path / "l.nii", label)
    status, out, err = run(*files, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
