import csv
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unetr_flax.commands.testing import LABEL, MISSED, SPACING, command, save
from unetr_flax.evaluation.files import evaluate_files
from unetr_flax.evaluation.scores import METRICS
from unetr_flax.imaging.file_grid_test import turned
from unetr_flax.imaging.volume import Volume
from unetr_flax.viewing import label_statistics

nib = pytest.importorskip("nibabel")
pytest.importorskip("scipy")

PNG = b"\x89PNG\r\n"
# Its axes run to the left and to the back unless it says otherwise.
METAIMAGE = b"""NDims = 3
DimSize = 8 9 7
ElementType = MET_UCHAR
ElementSpacing = 0.5 2 3
TransformMatrix = -1 0 0 0 -1 0 0 0 1
ElementDataFile = LOCAL
"""


@pytest.fixture
def folders(tmp_path):
    """Writes three cases, one of them in a subfolder and one whose label 2 is missed."""
    for name, array in (("a", LABEL), ("sub/b", np.roll(LABEL, 1, 0)), ("c", MISSED)):
        save(tmp_path / "predictions" / f"{name}.nii.gz", array)
        save(tmp_path / "labels" / f"{name}.nii", LABEL)
    return tmp_path / "predictions", tmp_path / "labels"


@pytest.fixture
def run(monkeypatch, capsys):
    return command(monkeypatch, capsys, "evaluate")


def test_folders_become_tables_and_files(run, folders, tmp_path):
    (tmp_path / "names.json").write_text('{"liver": 1, "spleen": 2}')
    save(tmp_path / "images" / "c_0000.nii.gz", np.arange(504, dtype=np.int16).reshape(8, 9, 7))
    outputs = {name: tmp_path / f"out.{name}" for name in ("csv", "json", "png")}
    worst = tmp_path / "worst"
    command = (*folders, "--labels", tmp_path / "names.json", "--cases", "--tolerance", 0.5)
    command += ("--csv", outputs["csv"], "--json", outputs["json"], "--plot", outputs["png"])
    command += ("--worst", 2, worst, "--images", tmp_path / "images", "--resamples", 50)
    status, out, err = run(*command)
    assert status == 0
    for shown in (
        r"liver +3 ",
        r"spleen +3 ",
        r"sub/b +liver",
        r"spleen .* inf .* missed",
        "0.5 mm",
    ):
        assert re.search(shown, out), shown

    with outputs["csv"].open() as file:
        rows = {(row["case"], row["name"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [(c, n) for c in ("a", "c", "sub/b") for n in ("liver", "spleen")]
    assert rows["c", "spleen"]["outcome"] == "missed"
    assert rows["c", "spleen"]["hd95_mm"] == "inf"
    # The box is three voxels of 0.5 mm wide.
    assert float(rows["sub/b", "liver"]["dice"]) == pytest.approx(2 / 3)
    assert float(rows["sub/b", "liver"]["hd95_mm"]) == 0.5
    assert float(rows["sub/b", "liver"]["label_ml"]) == pytest.approx(27 * 3 / 1000)

    content = json.loads(outputs["json"].read_text(), parse_constant=pytest.fail)
    spleen = content["labels"]["2"]
    assert (spleen["name"], spleen["cases"], spleen["missed"]) == ("spleen", 3, 1)
    assert spleen["assd_mm"]["mean"] == "inf"
    assert spleen["dice"]["low"] <= spleen["dice"]["mean"] <= spleen["dice"]["high"]
    assert content["cases"]["a"]["1"]["dice"] == 1

    assert outputs["png"].read_bytes().startswith(PNG)
    pictures = sorted(path.name for path in worst.iterdir())
    assert pictures == ["worst_01_c.png", "worst_02_sub_b.png"]
    assert all((worst / name).read_bytes().startswith(PNG) for name in pictures)
    assert err.count("\n") == 1
    assert "no scan named sub/b or sub/b_0000; drawn without the scan" in err

    # Nothing is replaced unless it is asked for; then pictures of the earlier run go.
    for option in (("--csv", outputs["csv"]), ("--worst", 1, worst)):
        status, out, err = run(*folders, *option)
        assert (status, out) == (2, "")
        assert "--overwrite replaces" in err
    assert run(*folders, "--worst", 1, worst, "--overwrite")[0] == 0
    assert [path.name for path in worst.iterdir()] == ["worst_01_c.png"]


def test_two_files_in_different_orientations(run, tmp_path):
    save(tmp_path / "prediction.nii.gz", LABEL, codes="LPS")
    save(tmp_path / "label.nii", LABEL, codes="SAR")
    (tmp_path / "labels.json").write_text('["background", "liver"]')
    status, out, _ = run(tmp_path / "prediction.nii.gz", tmp_path / "label.nii")
    assert status == 0
    assert re.search(r"liver +1  1\.000  1\.000 ", out)
    assert re.search(r"label 2 +1  1\.000  1\.000 ", out)


def test_empty_cases_agree_or_are_left_out(run, folders):
    for folder in folders:
        save(folder / "empty.nii", 0 * LABEL)
    table = r"label 1 +{}  \S+  \S+ .* {}       0         0"
    assert re.search(table.format(4, 1), run(*folders)[1])
    assert re.search(table.format(3, 1), run(*folders, "--empty", "skip")[1])


def test_only_the_labels_asked_for_are_scored_and_others_are_told(run, folders, tmp_path):
    (tmp_path / "names.json").write_text('{"2": "spleen", "9": "none"}')
    status, out, err = run(*folders, "--labels", tmp_path / "names.json")
    assert status == 0
    assert "label 1" not in out
    assert re.search(r"none +3  1\.000 .* 3       0         0", out)
    assert "labels 1: occur, but are not in --labels" in err


def test_unmatched_files_are_told_and_hidden_files_are_not_seen(run, folders):
    save(folders[0] / "only.nii", LABEL)
    save(folders[1] / "sub" / "more.nii", LABEL)
    save(folders[1] / "sub" / "._c.nii", LABEL)
    status, _, err = run(*folders)
    assert status == 0
    assert f"{folders[0]}: 1 without a match in {folders[1]}: only\n" in err
    assert f"{folders[1]}: 1 without a match in {folders[0]}: sub/more\n" in err
    assert err.count("\n") == 2


def test_linked_folders_are_searched_once(run, folders, tmp_path):
    (folders[0] / "sub" / "back").symlink_to(folders[0])
    (folders[0] / "sub").rename(tmp_path / "elsewhere")
    (folders[0] / "sub").symlink_to(tmp_path / "elsewhere")
    status, out, err = run(*folders)
    assert (status, err) == (0, "")
    assert re.search(r"label 1 +3 ", out)


def test_a_bad_case_is_told_and_the_others_are_scored(run, folders, tmp_path):
    save(folders[0] / "c.nii.gz", LABEL[1:])
    (folders[0] / "a.nii.gz").write_bytes(b"nothing")
    status, out, err = run(*folders, "--json", tmp_path / "out.json")
    assert status == 1
    assert re.search(r"label 1 +1  0\.667 ", out)
    assert re.search(r"a: .*a\.nii\.gz: not a readable NIfTI file", err)
    assert re.search(
        r"c: .*c\.nii\.gz: grid of \(7, 9, 7\) voxels, .*c\.nii has \(8, 9, 7\); the label maps of "
        "a case must be on one grid",
        err,
    )
    assert err.endswith("unetr: 2 of 3 cases could not be scored\n")
    content = json.loads((tmp_path / "out.json").read_text())
    assert sorted(content["failed"]) == ["a", "c"]
    assert list(content["cases"]) == ["sub/b"]


def test_grids_may_differ_by_a_tenth_of_a_voxel(folders, tmp_path):
    affine = np.diag([*SPACING, 1.0])
    affine[1, 3] = 0.19
    prediction = save(tmp_path / "moved.nii", LABEL, affine)
    evaluate_files(prediction, folders[1] / "a.nii")
    # The far corner moves by 8.5 times the difference of 0.02 voxels.
    affine = np.diag([SPACING[0], SPACING[1] * 1.02, SPACING[2], 1.0])
    save(prediction, LABEL, affine)
    message = r"moved\.nii: its grid is off by 0\.17 voxels \(0\.34 mm\) at a corner from .*a\.nii"
    with pytest.raises(ValueError, match=message):
        evaluate_files(prediction, folders[1] / "a.nii")


def test_rounding_near_45_degrees_turns_no_file(run, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("prediction.nii", "label.nii", "image.nii")]
    image = LABEL.astype(np.float32)
    for path, array, degrees in zip(
        files, (LABEL, LABEL, image), (44.9999, 45.0001, 44.9999), strict=True
    ):
        nib.save(nib.Nifti1Image(array, turned(degrees)), path)
    drawn = []

    def draw(case, names):
        drawn.append(case)
        return PNG

    monkeypatch.setattr("unetr_flax.evaluation.worst.draw_comparison", draw)
    worst = ("--worst", 1, tmp_path / "worst", "--images", files[2])
    status, out, err = run(*files[:2], *worst)
    assert (status, err) == (0, "")
    assert re.search(r"label 2 +1  1\.000  1\.000 ", out)
    np.testing.assert_array_equal(drawn[0].image, drawn[0].label)
    np.testing.assert_array_equal(drawn[0].prediction, drawn[0].label)
    assert sorted(drawn[0].label.shape) == sorted(LABEL.shape)


@pytest.mark.parametrize("options", [(), ("--regions", "liver=1")])
def test_volumes_of_sheared_voxels_are_those_of_statistics(run, tmp_path, options):
    affine = np.diag([*SPACING, 1.0])
    affine[0, 1] = 1.5
    files = [tmp_path / name for name in ("prediction.nii", "label.nii")]
    for path in files:
        nib.save(nib.Nifti1Image(LABEL, affine), path)
    assert run(*files, *options, "--json", tmp_path / "out.json")[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())["cases"]["prediction"]
    volume = Volume(np.zeros((*LABEL.shape, 1), np.float32), affine)
    assert found["1"]["label_ml"] == pytest.approx(
        label_statistics(volume, LABEL, {})[0].volume_ml, rel=1e-12
    )


def make_doubled(folders):
    save(folders[0] / "a.nii", LABEL)
    return folders


def make_nothing_matched(folders):
    (folders[1] / "a.nii").rename(folders[1] / "b.nii")
    return folders[0], folders[1] / "sub"


def make_empty(folders):
    return [save(folder / "empty.nii", 0 * LABEL) for folder in folders]


def make_negative(folders):
    return save(folders[0] / "a.nii", -LABEL.astype(np.int16)), folders[1] / "a.nii"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_doubled, (), "has the name of"),
        (make_nothing_matched, (), "3 files, none with the name of one of the 1 file in"),
        (make_negative, (), "prediction: labels -2 to 0, must be 0 to 65535"),
        (lambda f: (f[0], f[1] / "a.nii"), (), "is a folder and"),
        (lambda f: (f[0] / "none", f[1]), (), "none: no such file or folder"),
        (lambda f: f, ("--tolerance", "-1"), "tolerance=-1.0: must be a distance"),
        (lambda f: f, ("--resamples", "0"), "resamples=0: must be at least 1"),
        (lambda f: f, ("--worst", "0", "x"), "--worst 0: must be at least 1"),
        (lambda f: f, ("--images", "x"), "--images: only with --worst"),
        (lambda f: f, ("--worst", "1", "x", "--images", "none"), "none: no such file or folder"),
        (
            lambda f: f,
            ("--worst", "1", "x", "--images", __file__),
            "evaluate_test.py: is a file, must be a folder as ",
        ),
        (make_empty, (), "no label to score, only background"),
        (lambda f: f, ("--csv", "none/x.csv"), "none/x.csv: its folder is missing"),
        (lambda f: f, ("--json", "/"), "/: is a folder, must be a file"),
        (lambda f: f, ("--labels", "none.json"), "none.json: No such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(run, folders, make, options, message):
    status, out, err = run(*make(folders), *options)
    assert (status, out) == (2, "")
    assert err.startswith("unetr: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--csv", "x.csv"), "x.csv"),
        (("--json", "x.json"), "x.json"),
        (("--plot", "x.png"), "x.png"),
        (("--worst", "1", "x/y"), "worst.png"),
    ],
)
def test_folders_that_cannot_be_written_are_told_before_anything_is_scored(
    run, folders, tmp_path, monkeypatch, option, named
):
    def touch(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr("unetr_flax.evaluation.files.evaluate_files", lambda *_, **__: 1 / 0)
    *start, path = option
    status, out, err = run(*folders, *start, tmp_path / path)
    assert (status, out) == (2, "")
    assert err == f"unetr: [Errno 13] Permission denied: '{tmp_path / named}'\n"


def test_scans_of_any_format_are_found_and_two_of_a_name_refused_first(
    run, folders, tmp_path, monkeypatch
):
    images, worst = tmp_path / "images", tmp_path / "worst"
    images.mkdir()
    (images / "c_0000.mha").write_bytes(METAIMAGE + LABEL.tobytes(order="F"))
    drawn = []
    monkeypatch.setattr(
        "unetr_flax.evaluation.worst.draw_comparison", lambda case, _: drawn.append(case) or PNG
    )
    options = ("--worst", 1, worst, "--images", images)
    status, _, err = run(*folders, *options)
    assert (status, err) == (0, "")
    np.testing.assert_array_equal(drawn[0].image, LABEL)
    save(images / "c_0000.nii", LABEL)
    status, out, err = run(*folders, *options, "--overwrite")
    assert (status, out) == (2, "")
    assert "has the name of" in err


def test_where_no_case_has_a_mean_there_is_no_picture(run, tmp_path):
    files = [save(tmp_path / name, 0 * LABEL) for name in ("p.nii", "l.nii")]
    (tmp_path / "names.json").write_text('["background", "liver"]')
    options = ("--labels", tmp_path / "names.json", "--empty", "skip", "--images", files[0])
    status, _, err = run(*files, *options, "--worst", 1, tmp_path / "worst")
    assert status == 0
    assert err == f"unetr: {tmp_path}/worst: no picture, as all structures are empty in all cases\n"
    assert not list((tmp_path / "worst").iterdir())


def test_pictures_without_matplotlib_are_refused_first(run, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(*folders, "--plot", tmp_path / "x.png")
    assert (status, out) == (2, "")
    assert "need matplotlib: pip install 'unetr-flax[view]'" in err


def test_help_defines_every_metric(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for metric in METRICS[:5]:
        assert f"- {metric.title}: " in shown
    for rule in ("- volume: that of P minus", "neither map is an agreement", "are infinite"):
        assert rule in shown


def test_names_with_line_breaks_stay_one_line(run, tmp_path):
    for folder in ("p", "l"):
        save(tmp_path / folder / "a\nb.nii", LABEL)
    status, out, _ = run(tmp_path / "p", tmp_path / "l", "--cases", "--csv", tmp_path / "x.csv")
    assert status == 0
    assert r"a\nb" in out
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3


def test_the_command_is_there_without_packages_that_only_scoring_needs():
    code = "import sys, unetr_flax.commands.evaluate; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"scipy", "matplotlib", "nibabel"} & set(loaded.stdout.split())
