import errno
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import nibabel as nib
import numpy as np
import pytest

from unetr_flax import UNETR, Preprocessing, cli
from unetr_flax.imaging import FileGrid, Window
from unetr_flax.inference.outputs import CaseOutputs
from unetr_flax.inference.testing import fake_predictor, tiny_config
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import save_pretrained, to_torch, write_state_dict

CFG = tiny_config(3)
LABELS = ("background", "spleen", "left kidney")
CT = Preprocessing(("CT",), (Window(0, 2),), labels=LABELS)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def rounded(windows):
    """Computes logits by which the class is the intensity, 0 to 2 of `CT`."""
    return -np.abs(2 * windows - np.arange(3.0))


@functools.cache
def variables():
    return jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32), abstract_variables(UNETR(CFG))
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save_pretrained(folder, CFG, variables(), preprocessing=CT, provenance={"flips": [0]})
    return folder


@pytest.fixture
def predictors(monkeypatch):
    """Replaces `Predictor`, so that a voxel's class is its intensity; lists how it was called."""
    calls = []

    def build(models, **options):
        calls.append({"models": len(models), **options})
        return fake_predictor(rounded, num_classes=3)

    monkeypatch.setattr("unetr_flax.inference.predictor.Predictor", build)
    return calls


@pytest.fixture
def run(monkeypatch, capsys, predictors):
    """Runs `unetr predict`; returns the exit status, and what it prints."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["unetr", "predict", *map(str, args)])
        status = cli.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def refuses(run):
    """Runs a command that must end with status 2, and returns its one line."""

    def refuses(*args):
        status, out, err = run(*args)
        assert (status, out) == (2, "")
        assert err.startswith("unetr: ")
        assert err.count("\n") == 1
        return err

    return refuses


def write_scan(path, seed=0, shape=(7, 6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    scan = np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, AFFINE), path)
    return scan


def read(path):
    return np.asarray(nib.load(path).dataobj)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


@pytest.fixture
def scans(tmp_path):
    """Two patients with scans of the same name, and one scan that is damaged."""
    folder = tmp_path / "scans"
    write_scan(folder / "p1" / "ct.nii.gz", 1)
    write_scan(folder / "p2" / "ct.nii.gz", 2)
    (folder / "p2" / "bad\nname.nii").write_bytes(b"no scan")
    return folder


def test_a_folder_goes_on_after_a_bad_case_and_a_second_run_does_the_rest(run, model, scans):
    out = scans.parent / "out"
    status, shown, errors = run(model, scans, out)
    assert status == 1
    [failed, total] = errors.splitlines()
    assert failed.startswith(r"unetr: p2/bad\nname: failed: ")
    assert total == "unetr: 1 of 3 cases failed"
    assert f"{out}/p1/ct.nii.gz: spleen " in shown
    assert shown.count("\n") == 2
    assert files(out) == ["labels.json", "p1/ct.nii.gz", "p2/ct.nii.gz"]
    assert json.loads((out / "labels.json").read_text()) == {
        name: i for i, name in enumerate(LABELS)
    }
    for case in ("p1/ct.nii.gz", "p2/ct.nii.gz"):
        np.testing.assert_array_equal(read(out / case), read(scans / case))
        assert nib.load(out / case).get_data_dtype() == np.uint8
        np.testing.assert_array_equal(nib.load(out / case).affine, AFFINE)

    (scans / "p2" / "bad\nname.nii").unlink()
    write_scan(scans / "p2" / "late.nii")
    status, shown, _ = run(model, scans, out)
    assert status == 0
    assert "2 of 3 label maps are there; --overwrite replaces them" in shown
    assert "[1/1]" in shown
    status, shown, errors = run(model, scans, out)
    assert (status, shown.count("\n"), errors) == (0, 1, "")


def test_names_come_with_the_first_label_map(run, model, scans):
    bad, good, out = scans / "p2" / "bad\nname.nii", scans / "p2" / "ct.nii.gz", scans.parent / "o"
    assert run(model, bad, out)[0] == 1
    assert files(out) == []
    assert run(model, bad, out / "a.nii")[0] == 1
    assert files(out) == []
    assert run(model, good, out)[0] == 0
    # A run that is killed between the two leaves only the label map.
    (out / "labels.json").unlink()
    assert run(model, good, out)[0] == 0
    assert files(out) == ["ct.nii.gz", "labels.json"]
    other = Preprocessing(("CT",), (Window(0, 2),), labels=("background", "a", "b"))
    (scans.parent / "other.json").write_text(json.dumps(other.to_dict()))
    options = ("--overwrite", "--preprocessing", scans.parent / "other.json")
    assert run(model, good, out, *options)[0] == 0
    assert json.loads((out / "labels.json").read_text()) == {"background": 0, "a": 1, "b": 2}


def test_what_is_there_is_replaced_only_if_asked(run, model, scans, predictors):
    out = scans.parent / "out" / "labels.nii.gz"
    scan = scans / "p1" / "ct.nii.gz"
    assert run(model, scan, out)[0] == 0
    assert files(out.parent) == ["labels.labels.json", "labels.nii.gz"]
    np.testing.assert_array_equal(read(out), read(scan))
    out.write_bytes(b"mine")
    assert run(model, scan, out)[0] == 0
    assert out.read_bytes() == b"mine"
    assert len(predictors) == 1
    assert run(model, scan, out, "--overwrite")[0] == 0
    np.testing.assert_array_equal(read(out), read(scan))


def test_models_and_options_stand_in_any_order(run, model, scans, predictors):
    scan, out = scans / "p1" / "ct.nii.gz", scans.parent / "out.nii"
    assert run(model, model, "--overlap", "0.7", scan, "--flips", "0", "--overwrite", out)[0] == 0
    np.testing.assert_array_equal(read(out), read(scan))
    assert run(model, "--overwrite", "--roi-subset", "1", "--", model, scan, out)[0] == 0
    np.testing.assert_array_equal(read(out), read(scan) == 1)
    assert run("--flips", "0", "--fast", "--overwrite", model, model, scan, out)[0] == 0
    assert [(call["models"], call["flips"]) for call in predictors] == [(2, (0,)), (2, ()), (1, ())]


def test_statistics_pictures_pages_and_probabilities_lie_beside_the_labels(run, model, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    extras = ("--statistics", "--preview", "--html", "--probabilities")
    status, shown, _ = run(model, tmp_path / "a.nii.gz", tmp_path / "out", *extras)
    assert status == 0
    endings = ("html", "nii.gz", "png", "probabilities.nii.gz", "statistics.json")
    assert files(tmp_path / "out") == [*(f"a.{ending}" for ending in endings), "labels.json"]
    assert "left kidney" in shown.splitlines()[-1]
    statistics = json.loads((tmp_path / "out" / "a.statistics.json").read_text())
    assert str(int((scan == 2).sum())) in json.dumps(statistics)
    probabilities = read(tmp_path / "out" / "a.probabilities.nii.gz")
    assert probabilities.shape == (*scan.shape, 3)
    np.testing.assert_array_equal(probabilities.argmax(-1), scan)


def test_label_maps_are_changed_by_names_and_ids(run, refuses, model, tmp_path):
    scan = np.zeros((9, 8, 7), np.float32)
    scan[1:6, 1:6, 1:6] = 1
    scan[3, 3, 3] = 0
    scan[8, 7, 6] = 1
    scan[7, 1:3, 1] = scan[7, 6, 1] = 2
    nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "a.nii")
    out = tmp_path / "out.nii"
    one, two, filled, solid = scan.copy(), scan.copy(), scan.copy(), scan.copy()
    one[8, 7, 6] = solid[8, 7, 6] = 0
    two[7, 6, 1] = 0
    filled[3, 3, 3] = solid[3, 3, 3] = 1
    for options, expected in (
        (("--keep-largest",), np.minimum(one, two)),
        (("--keep-largest", "spleen"), one),
        (("--keep-largest", "2"), two),
        (("--keep-largest", "left kidney", "1"), np.minimum(one, two)),
        (("--fill-holes",), filled),
        (("--roi-subset", "left kidney"), scan * (scan == 2)),
        (("--roi-subset", "1", "--keep-largest", "--fill-holes"), solid * (solid == 1)),
    ):
        assert run(model, tmp_path / "a.nii", out, "--overwrite", *options)[0] == 0
        np.testing.assert_array_equal(read(out), expected, str(options))
    allowed = "must be a label of the model: spleen, left kidney, or an id from 1 to 2"
    for value in ("liver", "3", "0", "background"):
        line = refuses(model, tmp_path / "a.nii", tmp_path / "b.nii", "--roi-subset", value)
        assert line == f"unetr: --roi-subset {value}: {allowed}\n"
    assert files(tmp_path) == ["a.nii", "out.labels.json", "out.nii"]


def test_parts_together_are_all_cases(run, refuses, monkeypatch, model, tmp_path):
    for i in range(3):
        write_scan(tmp_path / "scans" / f"{i}.nii", i)
    scans, out = tmp_path / "scans", tmp_path / "out"
    status, shown, _ = run(model, scans, out, "--part", "1/2")
    assert status == 0
    assert "part 1 of 2 (--part): 2 of 3 cases\n" in shown
    assert files(out) == ["0.nii.gz", "2.nii.gz", "labels.json"]
    assert run(model, scans, out, "--part", "2/2")[0] == 0
    assert files(out) == ["0.nii.gz", "1.nii.gz", "2.nii.gz", "labels.json"]
    assert "--part 0/2: must be I/N" in refuses(model, scans, out, "--part", "0/2")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setenv("JOB_COMPLETIONS", "3")
    shown = run(model, scans, tmp_path / "k8s")[1]
    assert "part 2 of 3 (JOB_COMPLETION_INDEX): 1 of 3 cases\n" in shown
    assert files(tmp_path / "k8s") == ["1.nii.gz", "labels.json"]
    # A task of an array that is given one scan is not meant to do a part of it.
    status, shown, _ = run(model, scans / "0.nii", tmp_path / "one")
    assert (status, files(tmp_path / "one")) == (0, ["0.nii.gz", "labels.json"])
    assert "part" not in shown.replace(str(tmp_path), "")
    status, shown, _ = run(model, scans / "0.nii", tmp_path / "none", "--part", "2/2")
    assert (status, shown) == (0, "part 2 of 2 (--part): 0 of 1 cases\n")


def test_json_tells_of_all_cases_and_quiet_of_none(run, model, scans):
    out = scans.parent / "out"
    assert run(model, scans / "p1", out / "p1")[0] == 0
    status, shown, errors = run(model, scans, out, "--json", "--statistics")
    assert status == 1
    assert len(errors.splitlines()) == 2
    cases = {case["name"]: case for case in json.loads(shown)["cases"]}
    assert cases.keys() == {"p1/ct", "p2/ct", "p2/bad\nname"}
    assert {name: case["status"] for name, case in cases.items()} == {
        "p1/ct": "skipped",
        "p2/ct": "done",
        "p2/bad\nname": "failed",
    }
    scan = read(scans / "p2/ct.nii.gz")
    assert cases["p2/ct"]["voxels"] == {str(i): int((scan == i).sum()) for i in range(3)}
    assert cases["p2/ct"]["labels"] == str(out / "p2/ct.nii.gz")
    assert [row["name"] for row in cases["p2/ct"]["statistics"]] == list(LABELS[1:])
    assert "bad" in cases["p2/bad\nname"]["error"]
    status, shown, errors = run(model, scans / "p2" / "ct.nii.gz", out / "again", "--quiet")
    assert (status, shown, errors) == (0, "", "")


def test_voxels_that_are_no_numbers_are_refused_or_told(run, model, tmp_path):
    scan = write_scan(tmp_path / "a.nii")
    scan[2, 3, 4] = np.nan
    nib.save(nib.Nifti1Image(scan, AFFINE), tmp_path / "a.nii")
    status, _, errors = run(model, tmp_path / "a.nii", tmp_path / "b.nii")
    assert status == 1
    assert "1 voxels are NaN or infinite" in errors
    assert not (tmp_path / "b.nii").exists()
    status, shown, _ = run(model, tmp_path / "a.nii", tmp_path / "b.nii", "--allow-nan")
    assert status == 0
    assert "1 voxels were NaN, taken for the lowest" in shown
    assert read(tmp_path / "b.nii")[2, 3, 4] == 0


def test_a_pytorch_file_needs_preprocessing(run, refuses, model, scans):
    tmp_path = scans.parent
    file, scan, out = tmp_path / "model.safetensors", scans / "p1" / "ct.nii.gz", tmp_path / "o.nii"
    write_state_dict(file, to_torch(variables(), CFG), {"unetr_config": json.dumps(CFG.to_dict())})
    line = refuses(file, scan, out)
    assert "tells no preprocessing; give --preprocessing, one of btcv, spleen, " in line
    (tmp_path / "ct.json").write_text(json.dumps(CT.to_dict()))
    assert run(file, "--preprocessing", tmp_path / "ct.json", scan, out)[0] == 0
    np.testing.assert_array_equal(read(out), read(scan))
    # A model folder tells it in its config.json.
    assert run(file, scan, tmp_path / "p.nii", "--preprocessing", model / "config.json")[0] == 0
    line = refuses(file, scan, tmp_path / "q.nii", "--preprocessing", "spleen")
    assert "preprocessing: 2 labels, the model has 3" in line
    assert "--preprocessing lung: must be one of btcv" in refuses(
        file, scan, out, "--preprocessing", "lung"
    )


def test_what_cannot_be_started_is_one_line(run, refuses, model, scans, tmp_path):
    scan, out = scans / "p1" / "ct.nii.gz", tmp_path / "out"
    assert "0 paths are left after the options" in refuses("--roi-subset", "1", model, scan, out)
    assert "none: no such file or folder" in refuses(tmp_path / "none", scan, out)
    assert "must be a folder, " in refuses(model, scans, tmp_path / "out.nii")
    assert "no scans in this folder" in refuses(model, model, out)
    assert "--flips 1: " in refuses(model, scan, out, "--flips", "1")
    assert "trained with flips along 0" in refuses(model, scan, out, "--flips", "0", "1")
    assert "--device gpu:7: must be a device" in refuses(model, scan, out, "--device", "gpu:7")
    assert "overlap=1.0: must be in [0, 1)" in refuses(model, scan, out, "--overlap", "1")
    assert "a folder tells all of its model" in refuses(model, scan, out, "--num-heads", "2")
    (tmp_path / "file").write_text("")
    assert "must be a folder, or end in" in refuses(model, scan, tmp_path / "file")
    assert "file" in refuses(model, scan, tmp_path / "file" / "below")
    assert "must be a folder, or end in" in refuses(model, scan, tmp_path / "labels.nrrd")
    assert "none.nii: no such file or folder" in refuses(model, tmp_path / "none.nii", scan)
    assert not out.exists()


def test_label_maps_never_take_the_place_of_scans(run, refuses, model, scans):
    before = {path: path.read_bytes() for path in scans.rglob("*.*")}
    (scans / "link").symlink_to(scans / "p1")
    for source, target in (
        (scans / "p1" / "ct.nii.gz", scans / "link" / "ct.nii.gz"),
        (scans / "p1" / "ct.nii.gz", scans / "p1"),
    ):
        assert "is a scan of the input" in refuses(model, source, target, "--overwrite")
        assert "is a scan of the input" in refuses(model, source, target, "--part", "1/9")
    assert run(model, scans / "p1", scans / "p1" / "out")[0] == 0
    # Label maps of the first run are no scans of the second.
    assert "1 of 1 label maps are there" in run(model, scans / "p1", scans / "p1" / "out")[1]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_label_maps_never_lie_among_scans_where_the_next_run_takes_them_for_such(
    refuses, model, tmp_path
):
    write_scan(tmp_path / "scans" / "a_0000.nii")
    (tmp_path / "link").symlink_to(tmp_path / "scans")
    for source, target, message in (
        ("scans", "scans", "scans: is the folder of the scans, must be another one"),
        ("scans", "link", "link: is the folder of the scans, must be another one"),
        ("link", "scans", "scans: is the folder of the scans, must be another one"),
        ("link", "scans/a.nii.gz", "a.nii.gz: is in the folder of the scans, must be elsewhere"),
        ("scans", "link/new/a.nii", "a.nii: is in the folder of the scans, must be elsewhere"),
    ):
        assert message in refuses(model, tmp_path / source, tmp_path / target, "--overwrite")
    assert files(tmp_path / "scans") == ["a_0000.nii"]


def test_ctrl_c_leaves_no_file(run, monkeypatch, model, tmp_path):
    for name in "abc":
        write_scan(tmp_path / "scans" / f"{name}.nii", ord(name))
    calls = itertools.count()

    def interrupted(windows):
        # The 120 windows of a case are 40 batches, so this is the second case.
        if next(calls) == 50:
            raise KeyboardInterrupt
        return rounded(windows)

    monkeypatch.setattr(
        "unetr_flax.inference.predictor.Predictor",
        lambda models, **_: fake_predictor(interrupted, num_classes=3, roi=(2, 2, 2)),
    )
    out = tmp_path / "out"
    status, _, errors = run(model, tmp_path / "scans", out, "--probabilities")
    assert status == 130
    assert errors == "unetr: interrupted\n"
    assert sorted(os.listdir(out)) == ["a.nii.gz", "a.probabilities.nii.gz", "labels.json"]


def test_a_full_disk_leaves_no_half_file(run, monkeypatch, model, tmp_path):
    for name in "ab":
        write_scan(tmp_path / "scans" / f"{name}.nii")
    out = tmp_path / "out"

    def full(source, target, replace=os.replace):
        if str(target).endswith("a.nii.gz"):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr("unetr_flax.runtime.atomic.os.replace", full)
    status, _, errors = run(model, tmp_path / "scans", out)
    assert status == 1
    assert "a: failed: " in errors
    assert "No space left on device" in errors
    assert sorted(os.listdir(out)) == ["b.nii.gz", "labels.json"]


def test_probabilities_have_their_room_before_they_are_computed(run, monkeypatch, model, tmp_path):
    write_scan(tmp_path / "scans" / "a.nii")
    write_scan(tmp_path / "scans" / "b.nii")
    out = tmp_path / "out"
    # No room for a, then a file system that cannot promise room.
    answers = iter((errno.ENOSPC, errno.EOPNOTSUPP))

    def allocate(descriptor, offset, size):
        assert (offset, size) == (0, 7 * 6 * 5 * 3 * 4)
        number = next(answers)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", allocate)
        status, _, errors = run(model, tmp_path / "scans", out, "--probabilities")
    assert status == 1
    assert errors.startswith(
        f"unetr: a: failed: {out}/a.probabilities.nii.gz: no file for its array (No space left"
    )
    assert sorted(os.listdir(out)) == ["b.nii.gz", "b.probabilities.nii.gz", "labels.json"]
    outputs = CaseOutputs.of_file(out / "c.nii.gz")
    with outputs.probabilities_on_disk(FileGrid.from_affine((64, 64, 64), AFFINE), 2) as array:
        assert not array.any()
        assert os.stat(array.filename).st_blocks * 512 >= array.nbytes


def test_a_killed_run_leaves_no_half_file_and_is_gone_on_with(run, model, tmp_path):
    for name in "ab":
        write_scan(tmp_path / "scans" / f"{name}.nii")
    script = """
        import os, signal, sys
        from unetr_flax import cli
        from unetr_flax.commands import predict_test
        from unetr_flax.inference import predictor

        def killed(source, target, replace=os.replace):
            if str(target).endswith("b.nii.gz"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = killed
        fake = predict_test.fake_predictor(predict_test.rounded, num_classes=3)
        predictor.Predictor = lambda *args, **options: fake
        cli.main()
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(script), "predict"]
    killed = subprocess.run([*command, model, tmp_path / "scans", out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files(out)[1:] == ["a.nii.gz", "labels.json"]
    assert run(model, tmp_path / "scans", out)[0] == 0
    for name in "ab":
        np.testing.assert_array_equal(
            read(out / f"{name}.nii.gz"), read(tmp_path / "scans" / f"{name}.nii")
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_writes_the_same_files(monkeypatch, capsys, model, scans):
    pytest.importorskip("ray")
    monkeypatch.chdir(scans.parent)

    def run(*args):
        options = ("--roi-subset", "spleen", "--preprocessing", "ct.json", "--json")
        monkeypatch.setattr(sys, "argv", ["unetr", "predict", *map(str, args), *options])
        return cli.main(), capsys.readouterr().out

    (scans.parent / "ct.json").write_text(json.dumps(CT.to_dict()))
    shutil.copytree(model, "model")
    status, shown = run("model", "scans", "here")
    assert status == 1
    status_of_ray, shown_of_ray = run("model", "scans", "ray", "--ray", "local")
    assert status_of_ray == 1
    assert (
        files(scans.parent / "ray")
        == files(scans.parent / "here")
        == [
            "labels.json",
            "p1/ct.nii.gz",
            "p2/ct.nii.gz",
        ]
    )
    for case in ("p1/ct.nii.gz", "p2/ct.nii.gz"):
        np.testing.assert_array_equal(
            read(scans.parent / "ray" / case), read(scans.parent / "here" / case)
        )

    def outcomes(text):
        rows = [{**row, "seconds": None} for row in json.loads(text)["cases"]]
        return sorted(rows, key=lambda row: row["name"])

    expected = outcomes(shown.replace('"here/', '"ray/'))
    assert outcomes(shown_of_ray.replace(str(scans.parent) + "/", "")) == expected
    status, shown = run("model", "scans", "again", "--ray", "local", "--keep-largest", "liver")
    assert status == 2
