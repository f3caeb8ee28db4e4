"""Runs from their start to their results."""

import json
import threading
import time

import pytest

import train.run
from train.__main__ import main
from train.run_testing import TINY, records, snapshot

pytestmark = pytest.mark.usefixtures("stand_in")


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


def test_the_state_is_no_part_of_the_memory_that_a_step_may_take(
    data, tmp_path, monkeypatch, capsys
):
    made = threading.Event()
    create, check = train.run.create_state, train.run.check_step

    def create_and_tell(*args, **kwargs):
        made.set()
        return create(*args, **kwargs)

    def check_later(*args):
        assert made.wait(60)
        return check(*args)

    monkeypatch.setattr("train.run.create_state", create_and_tell)
    monkeypatch.setattr("train.run.check_step", check_later)
    monkeypatch.setattr("train.memory.available_memory", lambda: 0 if made.is_set() else 10**10)
    args = [*TINY, "--data", str(data), "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    assert "of 10 GB of memory on each device" in capsys.readouterr().out


def test_a_budget_sets_the_steps_and_a_resumed_run_keeps_them(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out)]
    assert main([*args, "--budget", "1s"]) == 2
    assert capsys.readouterr().err.startswith("--budget 1s: no training fits into it; ")
    assert not out.exists()
    assert main([*args, "--budget", "soon"]) == 2
    assert capsys.readouterr().err == "--budget soon: must be a time such as 90s, 15m or 2h\n"

    monkeypatch.setattr("train.measure.time_steps", lambda step, budget: step() or 100.0)
    monkeypatch.setattr("train.measure.judge", lambda *case: time.sleep(0.3))
    assert main([*args, "--budget", "1600s"], time.monotonic() - 60) == 0
    shown = capsys.readouterr().out
    schedule = json.loads((out / "run.json").read_text())["schedule"]
    assert schedule["step_seconds"] == 100
    assert schedule["validation_seconds"] >= 0.3
    assert 60 < schedule["spent_seconds"] < 160
    steps = schedule["total_steps"]
    assert 13 <= steps <= 15
    assert f"leave room for {steps} steps" in shown
    assert f"{steps} steps in {-(-steps // 2)} epochs; {out} starts at step 0" in shown
    # The measured steps left no trace in the data: the run is one of so many steps.
    assert records(out)[-2]["step"] == records(out)[-1]["step"] == steps

    monkeypatch.setattr("train.measure.time_steps", lambda step, budget: 1 / 0)
    assert main(["--out", str(out), "--resume"]) == 0
    assert f"starts at step {steps};" in capsys.readouterr().out
