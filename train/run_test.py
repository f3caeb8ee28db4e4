import json
import shlex
import signal
import socket
import subprocess
import sys
import textwrap

import nibabel as nib
import numpy as np
import pytest

import train.program
import train.run
from train.__main__ import main
from train.interrupt import Stopped
from train.stand_in import Small

TIMES = ("seconds", "waiting_for_data")
TINY = ["--num-phantoms", "5", "--roi-size", "16", "32", "16", "--patch-size", "16", "16", "8"]
TINY += ["--light-r", "32", "--hidden-size", "16", "--num-heads", "2", "--eval-every", "2"]
# A plan for data would choose others; without them programs compile faster.
TINY += ["--augmentation", "default", "--flips", "--ema-decay", "0"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Replaces the model by a small one, since these tests are about the flow of a run."""
    monkeypatch.setattr(train.program, "UNETR", Small)

    def save(folder, variables, record, step):
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(step))

    monkeypatch.setattr(train.run, "save_model", save)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Boxes that are brighter than the rest, so that even the stand-in finds them.

    Each has a dark face, so that the cases' Dice differ.
    """
    folder = tmp_path_factory.mktemp("data") / "Task00_Boxes"
    rng = np.random.default_rng(0)
    cases = []
    for i in range(5):
        label = np.zeros((18 + i, 30 + i, 17), np.uint8)
        label[4 : 9 + i, 6:22, 3 : 12 - i] = 1
        bright = label * (np.arange(len(label)) > 4)[:, None, None]
        image = (bright * 300.0 + rng.normal(0, 20, label.shape)).astype(np.int16)
        case = {"image": f"imagesTr/box_{i}.nii.gz", "label": f"labelsTr/box_{i}.nii.gz"}
        for key, array in (("image", image), ("label", label)):
            (folder / case[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), folder / case[key])
        cases.append(case)
    description = {
        "name": "Boxes",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "box"},
        "training": cases,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def records(out):
    """Returns the lines of metrics.jsonl without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: x for k, x in json.loads(line).items() if k not in TIMES} for line in lines]


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_cudnn_that_computes_wrongly_is_refused(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setattr("unetr_flax.runtime.cudnn.cuda_devices", lambda: ["gpu"])
    monkeypatch.setattr("unetr_flax.runtime.cudnn.cudnn_version", lambda: (9, 10, 2))
    out = tmp_path / "run"
    options = ["--data", str(data), "--out", str(out), "--dtype", "bfloat16", *TINY]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("cuDNN 9.10.2: computes wrong 3D convolutions in bfloat16")
    assert not out.exists()


def test_a_run_on_phantoms_from_start_to_results(tmp_path, capsys):
    out = tmp_path / "runs" / "a"
    args = [*TINY, "--out", str(out)]
    assert main([*args, "--epochs", "3"]) == 0
    shown = capsys.readouterr().out
    assert "4 cases to train on, 1 to validate" in shown
    labels = json.loads((out / "run.json").read_text())["dataset"]["labels"]
    assert all(name in shown.split("Best on the 1 validation cases")[1] for name in labels[1:])
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")
    for path in ("predictions.png", "metrics.jsonl", "tensorboard", "model"):
        assert str(out / path) in shown
    steps = [(r["kind"], r["step"]) for r in records(out)]
    assert steps == [
        ("train", 2),
        ("train", 4),
        ("validation", 4),
        ("train", 6),
        ("validation", 6),
    ]
    assert {*labels[1:], "mean_dice"} <= records(out)[-1].keys()

    before = snapshot(out)
    assert main([*args, "--epochs", "3"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"--out {out}: holds a run; add --resume" in line
    assert snapshot(out) == before

    # Nothing is left to train, but the results can be had again.
    assert main(["--out", str(out), "--resume"]) == 0
    assert "starts at step 6" in capsys.readouterr().out


def test_data_of_ones_own(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    args = [*TINY, "--data", data.name, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["options"]["data"] == str(data)
    assert record["model"]["img_size"] == [16, 32, 16]
    shown = capsys.readouterr().out
    assert "--epochs 1: given on the command line" in shown
    assert (tmp_path / "run" / "plan.txt").read_text().splitlines()[0].strip() in shown
    assert (tmp_path / "run" / "augmentation.png").read_bytes().startswith(b"\x89PNG")
    assert len(record["dataset"]["labels"]) == record["model"]["out_channels"]
    assert not (tmp_path / "run" / "data").exists()
    capsys.readouterr()

    # From elsewhere, with nothing but the folder.
    monkeypatch.chdir(tmp_path)
    assert main(["--out", "run", "--resume"]) == 0
    capsys.readouterr()
    assert main(["--out", "run", "--resume", "--learning-rate", "0.5"]) == 2
    line = capsys.readouterr().err
    rate = record["options"]["learning_rate"]
    assert line.startswith(f"--learning-rate 0.5: the run in run was started with {rate}")
    assert line.count("\n") == 1
    assert main(["--out", "run", "--resume", "--roi-size", "16", "16", "16"]) == 2
    assert (
        "--roi-size 16 16 16: the run in run was started with 16 32 16" in capsys.readouterr().err
    )


def test_a_run_written_before_run_json_had_its_name_goes_on(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*TINY, "--data", str(data), "--epochs", "2", "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    # Neither were the loss and the augmentation named.
    del record["options"]["loss"], record["options"]["augmentation"]
    (out / "config.json").write_text(json.dumps(record))
    (out / "run.json").unlink()
    capsys.readouterr()
    assert main(["--out", str(out), "--resume"]) == 0
    assert "starts at step 4" in capsys.readouterr().out
    assert main([*TINY, "--data", str(data), "--out", str(out)]) == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert main(["--out", str(out), "--resume", "--loss", "dice"]) == 2
    assert (
        f"--loss dice: the run in {out} was started with dice_cross_entropy"
        in capsys.readouterr().err
    )


def test_a_run_on_all_cases_ends_with_the_last_averages(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--val-fraction", "0", "--ema-decay", "0.5"]
    assert main([*args, "--epochs", "2", "--eval-every", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "5 cases to train on, 0 to validate" in shown
    assert "Trained on all cases; the model is that of step 4" in shown
    assert (out / "model" / "step").read_text() == "4"
    assert (out / "report.md").exists()


def test_names_with_brackets_and_colons_are_shown_as_they_are(data, tmp_path, capsys):
    folder = tmp_path / "Task [red]"
    folder.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(data / name)
    description = json.loads((data / "dataset.json").read_text())
    label = "lesion [/old] [left] :cat: $x_1$"
    description |= {"name": "[bold]Boxes[/]", "labels": {"0": "background", "1": label}}
    (folder / "dataset.json").write_text(json.dumps(description))
    out = tmp_path / "run"
    options = [*TINY, "--data", str(folder), "--epochs", "1", "--out", str(out)]
    assert main([*options, "--loss", "cross_entropy", "--augmentation", "none"]) == 0
    shown = capsys.readouterr().out
    assert "[bold]Boxes[/]: 4 cases" in shown
    assert f"{out} starts at step 0" in shown
    assert f"  {label} " in shown  # the line of the validation
    assert f"│ {label} │" in shown  # the table
    assert f"picture: {out / 'predictions.png'}" in shown

    description["training"][0]["image"] = "imagesTr/[nothing].nii.gz"
    (folder / "dataset.json").write_text(json.dumps(description))
    assert main([*options[:-1], str(tmp_path / "other")]) == 1
    assert str(folder / "imagesTr" / "[nothing].nii.gz") in capsys.readouterr().err


def test_regions_of_one_fold(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["--regions", "whole=1", "--num-folds", "5", "--fold", "1", "--epochs", "20"]
    args += ["--learning-rate", "0.3", "--data", str(data), "--out", str(out)]
    assert main([*TINY, "--eval-every", "20", *args]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["out_channels"] == 1
    assert record["dataset"]["labels"] == ["background", "whole"]
    assert records(out)[-1]["whole"] > 0.5
    assert "│ whole │" in capsys.readouterr().out


def test_a_run_on_all_cases_keeps_its_last_model(data, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["--val-fraction", "0", "--epochs", "2", "--eval-every", "1", "--data", str(data)]
    assert main([*TINY, *args, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "5 cases to train on, 0 to validate" in shown
    assert "Trained on all cases; the model is that of step 4" in shown
    assert (out / "model" / "step").read_text() == "4"
    assert "picture" not in shown


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


def test_one_command_starts_a_run_and_goes_on_with_it(data, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    out = tmp_path / "run"
    args = [*TINY, "--resume", "auto", "--out", str(out)]
    # What is left of a run that was killed before it began.
    (out / "data").mkdir(parents=True)
    (out / "run.lock").touch()
    assert main([*args, "--data", str(data), "--epochs", "2"]) == 0
    assert "starts at step 0" in capsys.readouterr().out
    assert not (out / "data").exists()
    assert main([*args, "--data", str(data), "--epochs", "2"]) == 0
    assert "starts at step 4" in capsys.readouterr().out

    # The data have moved, and the run becomes longer but never shorter.
    for path in data.iterdir():
        (moved / path.name).symlink_to(path)
    assert main([*args, "--data", str(moved), "--epochs", "3"]) == 0
    assert "6 steps in 3 epochs; " in capsys.readouterr().out
    options = json.loads((out / "run.json").read_text())["options"]
    assert (options["data"], options["epochs"]) == (str(moved), 3)
    assert [r["step"] for r in records(out) if r["kind"] == "train"] == [2, 4, 6]
    assert main([*args, "--epochs", "2"]) == 2
    line = capsys.readouterr().err
    assert line == (
        f"--epochs 2: the run in {out} was started with 3, which may grow but not shrink\n"
    )


def test_a_budget_sets_the_steps_and_a_resumed_run_keeps_them(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out)]
    assert main([*args, "--budget", "1s"]) == 2
    assert capsys.readouterr().err.startswith("--budget 1s: no training fits into it; ")
    assert not out.exists()
    assert main([*args, "--budget", "soon"]) == 2
    assert capsys.readouterr().err == "--budget soon: must be a time such as 90s, 15m or 2h\n"

    monkeypatch.setattr("train.measure.time_steps", lambda step, budget: step() or 100.0)
    assert main([*args, "--budget", "1600s"]) == 0
    shown = capsys.readouterr().out
    schedule = json.loads((out / "run.json").read_text())["schedule"]
    assert schedule["step_seconds"] == 100
    steps = schedule["total_steps"]
    assert 13 <= steps <= 15
    assert f"leave room for {steps} steps" in shown
    assert f"{steps} steps in {-(-steps // 2)} epochs; {out} starts at step 0" in shown
    # The measured steps left no trace in the data: the run is one of so many steps.
    assert records(out)[-2]["step"] == records(out)[-1]["step"] == steps

    monkeypatch.setattr("train.measure.time_steps", lambda step, budget: 1 / 0)
    assert main(["--out", str(out), "--resume"]) == 0
    assert f"starts at step {steps};" in capsys.readouterr().out


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


PROGRAM = textwrap.dedent(
    """
    import sys, train.program, train.run
    from train.__main__ import main
    from train.stand_in import Small
    train.program.UNETR = Small
    train.run.save_model = lambda *args: None
    sys.exit(main(sys.argv[1:]))
    """
)


def start(args):
    command = [sys.executable, "-c", PROGRAM, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupt_saves_and_says_how_to_go_on(data, tmp_path, capsys):
    out = tmp_path / "a run"
    args = [*TINY, "--data", str(data), "--epochs", "100", "--eval-every", "100", "--out", str(out)]
    process = start(args)
    with process:
        while "epoch 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    command = shlex.split(shown.splitlines()[-1])
    assert command == ["python", "-m", "train", "--out", str(out), "--resume"]
    (last,) = (out / "checkpoints" / "last").iterdir()
    assert f"Saved at step {last.name}. " in shown
    assert 2 <= int(last.name) < 100

    assert main(command[3:]) == 0
    assert f"starts at step {last.name};" in capsys.readouterr().out
    # Data, state and log went on as if nothing had happened.
    assert main([*args[:-1], str(tmp_path / "straight")]) == 0
    assert records(out) == records(tmp_path / "straight")
    assert len(records(out)) == 101


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_has_its_status(
    number, status, data, tmp_path, monkeypatch, capsys
):
    def stopped(*_):
        raise Stopped(number)

    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--epochs", "1"]
    monkeypatch.setattr("train.run.prepare", stopped)
    assert main(args) == status
    assert capsys.readouterr().err == "Stopped before the run began.\n"
    assert not out.exists()


@pytest.mark.parametrize(
    "several",
    [
        ["--batch-size", "2"],
        # Both processes load the same volumes, and each trains on one half of them.
        pytest.param(
            ["--batch-size", "1", "--roi-size", "32", "32", "16", "--depth-shards", "2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["batch", "depth"],
)
def test_two_processes_make_the_run_that_one_makes(several, data, tmp_path):
    args = [*TINY, "--data", str(data), *several, "--val-fraction", "0.4"]
    args += ["--epochs", "20", "--eval-every", "10", "--learning-rate", "0.3"]
    assert main([*args, "--depth-shards", "1", "--out", str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args += ["--coordinator-address", f"localhost:{port}", "--num-processes", "2"]
    args += ["--out", str(tmp_path / "two")]
    processes = [start([*args, "--process-id", str(i)]) for i in range(2)]
    shown = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        shown.append(out)
    assert "Best on the 2 validation cases" in shown[0]
    assert "epoch" not in shown[1]

    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 22
    for a, b in zip(one, two, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert b == pytest.approx(a, rel=1e-3)
    assert one[-1]["mean_dice"] > 0.5
