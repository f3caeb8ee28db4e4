import dataclasses

import pytest

from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.race import RaceError, Result, _check_agreement
from benchmarks.report import best_of_torch, markdown

CASE = Case("reference", 32, 2, "float32")


def result(side, walls, what="step"):
    peak = 3 * 2**30 if what == "step" else None
    return Result(CASE, side, what, first=9.0, walls=walls, cpus=walls, peak=peak)


RESULTS = [
    result("ours", [1.0, 2.0, 2.0, 2.0, 9.0]),
    result("torch", [4.0, 4.0, 4.0]),
    result("torch-compile", [3.0, 3.0, 3.0]),
    result("torch", [0.1, 0.1, 0.1], "forward"),
]


def test_ratios_are_of_medians_and_against_the_best_rival():
    assert best_of_torch(RESULTS, RESULTS[0]) == 3.0
    assert best_of_torch(RESULTS[:1], RESULTS[0]) is None
    where = dict.fromkeys(("python", "jax", "jaxlib", "flax", "torch", "monai"), "1")
    table = markdown(RESULTS, {**where, "devices": ["x"], "processor": "y", "cores": 2}, "")
    assert "| step | ours | 9.0 s | 2.000 s | 100% | 1.50 x | 3.00 GiB |" in table
    assert "| forward | torch | 9.0 s | 0.100 s | 0% | 1.00 x |  |" in table


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
        (["--rounds", "1"], "--rounds must be at least 2"),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, args, message):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks: {message}")
    assert error.count("\n") == 1
