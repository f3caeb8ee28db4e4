import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import race as races
from benchmarks.__main__ import GPU, _cases, main
from benchmarks.cases import GPU_SHAPES, Case, environment
from benchmarks.race import RaceError, Result, Side, SideError, _check_agreement, race
from benchmarks.report import as_json, best_of_torch, markdown, plot
from benchmarks.roofline import Cost, Peaks

CASE = Case("reference", 32, 2, "float32")
WHERE = dict.fromkeys(("python", "jax", "jaxlib", "flax", "torch", "monai"), "1")
WHERE |= {"devices": ["x"], "processor": "y", "cores": 2}


def result(side, walls, what="step", **fields):
    peak = 3 * 2**30 if what == "step" else None
    return Result(CASE, side, what, first=9.0, walls=walls, cpus=walls, peak=peak, **fields)


RESULTS = [
    result("ours", [1.0, 2.0, 2.0, 2.0, 9.0]),
    result("torch", [4.0, 4.0, 4.0]),
    result("torch-compile", [3.0, 3.0, 3.0]),
    result("torch", [0.01, 0.01, 0.01], "forward"),
    Result(CASE, "torch-channels-last", "step", failure="out of memory"),
]


def test_ratios_are_of_medians_and_against_the_best_rival():
    assert best_of_torch(RESULTS, RESULTS[0]) == 3.0
    assert best_of_torch(RESULTS[:1], RESULTS[0]) is None
    table = markdown(RESULTS, WHERE, "")
    assert "| step | ours | 9.0 s | 2.000 s | 100% | 1 | 1.50 x | 3.00 GiB |" in table
    assert "| forward | torch | 9.0 s | 10.00 ms | 0% | 200 | 1.00 x |  |" in table
    assert "| step | torch-channels-last | out of memory |" in table
    assert "roofline" not in table


def test_the_roofline_is_what_the_device_could_do(tmp_path):
    # 6e12 operations in 2 s, of which 10e12 a second are possible; 5e9 bytes, of 2e10 a second.
    costly = result("ours", [2.0] * 3, cost=Cost(flops=6e12, traffic=5e9, needed=2**30))
    peaks = Peaks(flops=10e12, bandwidth=2e10)
    table = markdown([costly, *RESULTS], WHERE, "", peaks)
    assert "| step | ours | 6 T | 4.66 GiB | 3 | 30% | 2.5 | 12% | 30% | 1.00 GiB |" in table
    assert table.count("| step | ours |") == 3
    assert peaks.seconds(Cost(flops=1e12, traffic=6e9, needed=0)) == 0.3
    found = json.loads(json.dumps(as_json([costly, *RESULTS], WHERE, "", peaks)))
    assert found["peaks"] == {"flops": 10e12, "bandwidth": 2e10}
    assert found["results"][0]["cost"]["flops"] == 6e12
    assert found["results"][0]["volumes_per_second"] == 1
    assert found["results"][-1]["failure"] == "out of memory"
    plot([costly, *RESULTS], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size


class FakeSide:
    """Answers as a worker does, except to commands for which it pretends to lack memory."""

    alive: list = []  # noqa: RUF012
    together = 0
    fails = {"torch": "step", "torch-compile": "start"}  # noqa: RUF012
    device = "cpu"

    def __init__(self, name, case, log, keep_freed_memory):
        self.name = name
        if self.fails.get(name) == "start":
            raise SideError("out of memory")
        self.alive.append(name)
        type(self).together = max(self.together, len(self.alive))

    def ask(self, command):
        if self.fails.get(self.name) == command:
            raise SideError("out of memory")
        if command == "peak":
            return {"peak": 5}
        if command.startswith("cost"):
            cost = {"flops": 1.0, "traffic": 2.0, "needed": 3}
            return cost if self.name == "ours" else {}
        return {"wall": 2.0, "cpu": 3.0, "value": [1.0]}

    def close(self):
        self.alive.remove(self.name)


@pytest.mark.parametrize(("device", "together"), [("cpu", 2), ("gpu", 1)])
def test_a_side_without_memory_is_told_and_the_others_go_on(
    monkeypatch, tmp_path, device, together
):
    monkeypatch.setattr(races, "Side", FakeSide)
    monkeypatch.setattr(FakeSide, "together", 0)
    monkeypatch.setattr(FakeSide, "device", device)
    options = {"device": device, "keep_freed_memory": False, "profile": False}
    names = ["ours", "torch", "torch-compile"]
    results = race(CASE, names, 3, tmp_path, say=lambda line: None, **options)
    found = {(r.side, r.what): r for r in results}
    assert list(found) == [(name, what) for what in ("forward", "step") for name in names]
    assert found["ours", "step"].walls == [2.0] * 3
    assert found["ours", "step"].peak == 5
    assert found["ours", "forward"].cost == Cost(1.0, 2.0, 3)
    assert found["torch", "forward"].failure is None
    for side, what in (("torch", "step"), ("torch-compile", "forward"), ("torch-compile", "step")):
        assert found[side, what].failure == "out of memory"
    assert not FakeSide.alive
    assert FakeSide.together == together
    monkeypatch.setattr(FakeSide, "device", "tpu")
    with pytest.raises(RaceError, match=f"ours: computes on tpu, the race is on {device}"):
        race(CASE, names, 3, tmp_path, say=lambda line: None, **options)
    assert not FakeSide.alive


WORKER = """
import os, signal, sys
print('{"device": "cpu"}', flush=True)
for line in sys.stdin:
    if line == "die\\n":
        os.kill(os.getpid(), signal.SIGKILL)
    if line == "fall over\\n":
        sys.exit(1)
    print('{"failure": "out of memory"}' if line == "step\\n" else '{"error": "why"}', flush=True)
"""


def test_a_worker_is_asked_until_it_is_gone(monkeypatch, tmp_path):
    start = races.subprocess.Popen

    def popen(command, **options):
        assert command[1:5] == ["-m", "benchmarks.worker", "ours", "reference"]
        return start([sys.executable, "-c", WORKER], **options)

    monkeypatch.setattr(races, "subprocess", SimpleNamespace(Popen=popen, PIPE=-1))
    log = tmp_path / "log"
    side = Side("ours", CASE, log, False)
    with pytest.raises(SideError, match="out of memory"):
        side.ask("step")
    with pytest.raises(RaceError, match="ours: why"):
        side.ask("forward")
    for _ in range(2):
        with pytest.raises(SideError, match="out of memory"):
            side.ask("die")
    side.close()
    side = Side("ours", CASE, log, False)
    with pytest.raises(RaceError, match=f"ours: fell over, {log}"):
        side.ask("fall over")
    side.close()


def test_workers_leave_the_gpu_to_those_who_compute():
    assert environment("ours")["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert environment("torch-compile")["JAX_PLATFORMS"] == "cpu"


def test_sides_that_compute_something_else_are_not_timed():
    _check_agreement(CASE, "step", {"ours": [1.0], "torch": [1.00001]})
    with pytest.raises(RaceError, match=r"step of ours gives 1\.0, of torch 1\.1"):
        _check_agreement(CASE, "step", {"ours": [1.0], "torch": [1.1]})
    with pytest.raises(RaceError, match="of torch nan"):
        _check_agreement(CASE, "step", {"ours": [1.0], "torch": [float("nan")]})


def test_a_case_is_the_model_of_its_family():
    assert CASE.cfg.channels == (16, 32, 64, 128)
    assert dataclasses.replace(CASE, family="monai").cfg.family == "monai"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--edges", "20"], "--edges 20: must be a multiple of 16"),
        (["--sides", "ours", "theirs"], "--sides theirs: must be among"),
        (["--rounds", "1"], "--rounds 1: must be at least 2"),
        (["--edges"], "--edges and --batches: name no shape"),
        (["--gpu"], "--gpu: JAX finds no GPU here, but cpu"),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, args, message):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks: {message}")
    assert error.count("\n") == 1


def test_a_gpu_has_its_own_shapes():
    def shapes(**changes):
        return [(c.edge, c.batch) for c in _cases(dataclasses.replace(GPU, **changes))]

    assert shapes() == list(GPU_SHAPES)
    assert shapes(batches=(2, 8)) == [(96, 2), (96, 8)]
    assert shapes(edges=(32,)) == [(32, 1)]
    assert shapes(edges=(32, 48), batches=(2,)) == [(32, 2), (48, 2)]
    assert {case.dtype for case in _cases(GPU)} == {"bfloat16"}
