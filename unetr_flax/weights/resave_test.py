"""The command that refused files name, run as a user would run it on every kind of container."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unetr_flax.weights import CheckpointError, read_state_dict
from unetr_flax.weights.resave import main

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TENSORS = {"vit.blocks.0.weight": torch.arange(6.0).reshape(2, 3), "out.bias": torch.ones(2)}
# An object of a class that torch does not load by itself.
UNSAFE = {"args": Path("runs")}


def linear() -> torch.nn.Module:
    """Makes a module whose state dict is "weight" [2, 3] and "bias" [2]."""
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(TENSORS["vit.blocks.0.weight"])
        module.bias.copy_(TENSORS["out.bias"])
    return module


def script() -> torch.nn.Module:
    # torch.jit warns that it is deprecated.
    with pytest.warns():
        return torch.jit.script(linear())


def prefixed(prefix):
    return {prefix + key: value for key, value in TENSORS.items()}


# For each name: the saved object, whether its keys are a module's, and the container's name.
CONTAINERS = {
    "flat": (lambda: {**TENSORS, **UNSAFE}, False, "state dict"),
    "module": (lambda: {"module": TENSORS, **UNSAFE}, False, "module of a checkpoint"),
    "nested": (
        lambda: {"model": {"state_dict": prefixed("module."), "lr": 0.1}, **UNSAFE},
        False,
        "state_dict of model of a checkpoint, prefix 'module.' removed",
    ),
    "state_dict": (
        lambda: {
            "state_dict": {**prefixed("net."), "net.n.num_batches_tracked": torch.tensor(3)},
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
            "epoch": 3,
            **UNSAFE,
        },
        False,
        "state_dict of a checkpoint, prefix 'net.' removed, 1 counter dropped",
    ),
    "whole module": (linear, True, "state dict"),
    "whole module in a checkpoint": (
        lambda: {"model": linear(), "epoch": 3},
        True,
        "model of a checkpoint",
    ),
    "TorchScript": (script, True, "state dict"),
}


def save(path, obj):
    if isinstance(obj, torch.jit.ScriptModule):
        with pytest.warns():
            torch.jit.save(obj, path)
    else:
        torch.save(obj, path)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_printed_command_saves_the_tensors(tmp_path, kind):
    make, of_module, held = CONTAINERS[kind]
    # A shell must not take any of these characters for its own.
    path = tmp_path / 'it\'s $1 `b` "c".pt'
    save(path, make())
    with pytest.raises(CheckpointError) as error:
        read_state_dict(path)
    command = str(error.value).partition("save its tensors by: python ")[2]
    run = subprocess.run(
        f'"{sys.executable}" {command}',
        shell=True,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    out = Path(f"{path}.safetensors")
    assert run.returncode == 0, run.stderr
    assert run.stderr == f"warning: running the code in {path}\n"
    assert run.stdout == f"{out}: written ({held})\n"
    expected = dict(zip(("weight", "bias"), TENSORS.values(), strict=True))
    expected = expected if of_module else TENSORS
    found = read_state_dict(out).state_dict
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key].numpy()) for key in expected)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"epoch": 7, **UNSAFE}, "holds nothing"),
        ({"state_dict": {}, **UNSAFE}, "holds nothing"),
        (Path("runs"), "holds an object of type"),
        ({"model": TENSORS, "net": TENSORS, **UNSAFE}, "state dicts under model and net"),
        ({"weights": {"a": TENSORS}, **UNSAFE}, "entry 'weights' is of type dict"),
        ({"model": {"a": torch.tensor(torch.nan)}, **UNSAFE}, "not written, a: 1 of 1 numbers"),
    ],
)
def test_nothing_to_save_is_one_line(tmp_path, capsys, obj, message):
    path = tmp_path / "a.pt"
    torch.save(obj, path)
    assert main([str(path)]) == 2
    warning, line = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: running the code in ")
    assert re.match(r"resave: .*a\.pt", line)
    assert message in line
    assert os.listdir(tmp_path) == ["a.pt"]


def test_files_that_cannot_be_loaded_are_one_line(tmp_path, capsys):
    path = tmp_path / "a.pt"
    assert main([str(path)]) == 2
    path.write_bytes(b"\x80\x02cno_such_module\nNet\n.")
    assert main([str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "No such file" in lines[1]
    assert "a.pt: cannot be loaded (No module named 'no_such_module')" in lines[3]
    assert len(lines) == 4
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_numpy_arrays_are_saved_like_tensors(tmp_path):
    path = tmp_path / "a.pt"
    arrays = {key: value.numpy() for key, value in TENSORS.items()}
    torch.save({"model": {**arrays, "out.scale": torch.ones(3)}, "epoch": np.int64(3)}, path)
    assert main([str(path)]) == 0
    found = read_state_dict(tmp_path / "a.pt.safetensors").state_dict
    assert found.keys() == {*TENSORS, "out.scale"}
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


def test_named_extras_are_left_out(tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {**TENSORS, "loss.weight": torch.ones(2)}, **UNSAFE}, path)
    assert main([str(path), "--ignore", "loss.*"]) == 0
    assert "ignored" in capsys.readouterr().out
    assert read_state_dict(tmp_path / "a.pt.safetensors").state_dict.keys() == TENSORS.keys()


def test_nothing_is_overwritten(tmp_path, capsys):
    path, out = tmp_path / "a.pt", tmp_path / "a.pt.safetensors"
    torch.save({"model": TENSORS, **UNSAFE}, path)
    out.write_text("years of work")
    assert main([str(path)]) == 2
    assert f"{out}: is there already" in capsys.readouterr().err
    assert out.read_text() == "years of work"
