"""Runs that stop and go on, and runs of several processes."""

import json
import shlex
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from train.__main__ import main
from train.interrupt import Stopped
from train.run_testing import TINY, records

pytestmark = pytest.mark.usefixtures("stand_in")

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


def test_a_run_that_stops_before_its_first_step_keeps_its_plan(data, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise Stopped(signal.SIGTERM)

    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--out", str(out), "--resume", "auto", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run.create_state", stopped)
        assert main(args) == 143
    planned = capsys.readouterr().out
    assert not (out / "plan.txt").exists()
    assert main(args) == 0
    lines = (out / "plan.txt").read_text().splitlines()
    assert "--epochs 1: given on the command line" in lines
    assert all(line in planned for line in lines)
    assert lines[0] in (out / "report.md").read_text()


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
    ("error", "told"),
    [
        (MemoryError("Unable to allocate 64.0 MiB"), "Unable to allocate 64.0 MiB"),
        (MemoryError(), "Python does not say for what"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nxx"),
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
        ),
    ],
)
def test_memory_that_runs_out_is_told_with_the_command_that_goes_on(
    error, told, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"

    def segment(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("train.validate.Evaluator.segment", segment)
        assert main([*TINY, "--data", str(data), "--epochs", "1", "--out", str(out)]) == 1
    first, command = capsys.readouterr().err.splitlines()
    assert first == f"Memory ran out: {told}. Once there is more, to go on:"
    assert main(shlex.split(command)[3:]) == 0


def test_other_errors_of_a_program_are_shown_whole(data, tmp_path, monkeypatch):
    def segment(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr("train.validate.Evaluator.segment", segment)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main([*TINY, "--data", str(data), "--epochs", "1", "--out", str(tmp_path / "run")])


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
