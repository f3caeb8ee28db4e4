"""What is refused, and leaves no trace."""

import json
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from train.__main__ import main
from train.interrupt import Stopped
from train.run_dir import OptionError
from train.run_testing import TINY, snapshot

pytestmark = pytest.mark.usefixtures("stand_in")


def test_a_cudnn_that_computes_wrongly_is_refused(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setattr("unetr_flax.runtime.cudnn.cuda_devices", lambda: ["gpu"])
    monkeypatch.setattr("unetr_flax.runtime.cudnn.cudnn_version", lambda: (9, 10, 2))
    out = tmp_path / "run"
    options = ["--data", str(data), "--out", str(out), "--dtype", "bfloat16", *TINY]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("cuDNN 9.10.2: computes wrong 3D convolutions in bfloat16")
    assert not out.exists()


def test_data_without_foreground_are_refused(data, tmp_path, capsys):
    folder = tmp_path / "empty"
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "imagesTr").symlink_to(data / "imagesTr")
    (folder / "dataset.json").write_bytes((data / "dataset.json").read_bytes())
    for path in (data / "labelsTr").iterdir():
        label = nib.load(path)
        empty = nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine)
        nib.save(empty, folder / "labelsTr" / path.name)
    out = tmp_path / "run"
    assert main([*TINY, "--data", str(folder), "--out", str(out)]) == 1
    line = "Boxes: no voxel of the 4 training cases is labeled as box; all are background, so there"
    assert capsys.readouterr().err.startswith(line)
    assert not out.exists()


def test_data_that_changed_are_noticed_on_resuming(data, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in data.rglob("*"):
        target = folder / path.relative_to(data)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    out = str(tmp_path / "run")
    assert main([*TINY, "--data", str(folder), "--epochs", "1", "--out", out]) == 0
    description = json.loads((folder / "dataset.json").read_text())
    description["training"].pop()
    (folder / "dataset.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert main(["--out", out, "--resume"]) == 2
    assert "cases, labels or files have changed" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--epochs", "1", "--out", str(out)]
    code = "import sys; from pathlib import Path; from train.run_lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        owner.stdout.readline()
        before = snapshot(out)
        assert main(args) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"--out {out}: is in use by process {owner.pid} on ")
        assert line.count("\n") == 1
        assert snapshot(out) == before
        owner.communicate(b"\n")
    assert main(args) == 0
    capsys.readouterr()


def test_a_folder_that_cannot_be_written_is_one_line(data, capsys):
    assert main([*TINY, "--data", str(data), "--out", "/proc/run"]) == 1
    assert capsys.readouterr().err == "/proc/run: No such file or directory\n"


def test_bad_files_are_all_named_before_anything_is_written(data, tmp_path, capsys):
    folder = tmp_path / "bad"
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "imagesTr").symlink_to(data / "imagesTr")
    (folder / "dataset.json").write_bytes((data / "dataset.json").read_bytes())
    labels = sorted((data / "labelsTr").iterdir())
    for path in labels[:-1]:
        (folder / "labelsTr" / path.name).write_bytes(path.read_bytes())
    truncated = folder / "labelsTr" / labels[0].name
    truncated.write_bytes(truncated.read_bytes()[:100])
    out = tmp_path / "run"
    assert main([*TINY, "--data", str(folder), "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert str(truncated) in lines[0]
    assert str(folder / "labelsTr" / labels[-1].name) in lines[1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--patch-size", "16", "16", "32"], 2, "--patch-size 16 16 32: each must be one of"),
        (["--roi-size", "16", "24", "16"], 2, "--roi-size 16 24 16: each must be divisible by"),
        (["--epochs", "0"], 2, "--epochs 0: must be above 0"),
        (["--loss", "mse"], 2, "--loss mse: must be dice_cross_entropy"),
        (["--augmentation", "some"], 2, "--augmentation some: must be default, none"),
        # Options are judged before the data are read.
        (["--loss", "mse", "--data", "nowhere"], 2, "--loss mse"),
        (["--num-heads", "3", "--data", "nowhere"], 2, "--num-heads 3: must divide"),
        (["--val-fraction", "0.01"], 1, "val_fraction=0.01"),
        (["--roi-size", "1024", "1024", "1024"], 2, "--roi-size 1024 1024 1024"),
        (["--hidden-size", "1000000"], 2, "--hidden-size 1000000 --num-layers 4"),
        (["--batch-size", "1000000000"], 2, "--batch-size 1000000000: a step takes over"),
        (["--fold", "3"], 2, "--fold 3: needs --num-folds or --splits"),
        (["--class-weights", "1", "2", "3"], 2, "--class-weights 1.0 2.0 3.0: must be 2 numbers"),
        (["--data", "nowhere"], 1, "nowhere: no such folder; --data must hold"),
        (["--resume"], 2, "run: holds no run to resume"),
    ],
)
def test_what_cannot_be_is_one_line(args, status, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--out", "run", "--data", str(data), *args]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "nowhere"], "--init nowhere: no such file or folder"),
        (["--fsdp", "3"], "--fsdp 3 --depth-shards 1: their product must divide"),
        (["--out", "taken"], "--out taken: exists and is not empty"),
        (["--roi-size", "1024", "1024", "1024"], "--roi-size 1024 1024 1024 --batch-size"),
        (["--hidden-size", "1000000"], "--hidden-size 1000000 --num-layers 4"),
        (["--light-r", "0.001"], "--hidden-size 16 --num-layers 4 --light-r 0.001"),
    ],
)
def test_what_needs_no_data_is_judged_before_they_are_read(
    options, message, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "mine").mkdir(parents=True)
    monkeypatch.setattr("train.plan.take_fingerprint", lambda *args: 1 / 0)
    assert main([*TINY, "--data", str(data), "--out", "run", *options]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["check_step", "with_initial_weights"])
def test_a_new_run_that_is_refused_late_leaves_its_folder_as_it_was(
    place, data, tmp_path, monkeypatch, capsys
):
    def start(place, error):
        def fail(*args):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"train.run.{place}", fail)
            return main([*TINY, "--data", str(data), "--out", str(tmp_path), "--resume", "auto"])

    assert start(place, OptionError("too much")) == 2
    assert capsys.readouterr().err == "too much\n"
    assert not list(tmp_path.iterdir())
    # A run that was stopped may be right for another machine.
    assert start("with_initial_weights", Stopped(signal.SIGINT)) == 130
    assert start(place, OptionError("too much")) == 2
    assert (tmp_path / "run.json").exists()


def test_phantoms_of_a_run_that_never_began_are_removed(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--val-fraction", "0.01", "--out", str(out)]) == 1
    assert not (out / "data").exists()
    assert main([*TINY, "--epochs", "1", "--out", str(out)]) == 0


def test_a_folder_that_checkpoints_cannot_be_read_from_is_refused(tmp_path, capsys):
    out = tmp_path / "[blue] run"
    assert main([*TINY, "--out", str(out)]) == 2
    assert f"--out {out}: checkpoints cannot be read from a path with" in capsys.readouterr().err
    assert not out.exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
