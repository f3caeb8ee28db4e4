import itertools
import json
import types

import pytest

from benchmarks import learning_torch
from benchmarks.learning import Options as LearningOptions
from benchmarks.learning import SideFailed, _follow, _train, main
from benchmarks.learning_curve import (
    CURVE,
    Point,
    dice_limits,
    markdown,
    minutes_to,
    plot,
    read_curve,
)
from benchmarks.learning_torch import Clock, Rival, train
from train.command_line import parse
from train.console import make_console
from train.run_dir import OptionError
from train.task import prepare

CURVES = {
    "ours": [Point(60, 10, 0.5), Point(120, 20, 0.9), Point(180, 30, 0.88)],
    "monai": [Point(60, 5, 0.2), Point(186, 15, 0.7)],
}


def test_sides_are_compared_where_all_have_been(tmp_path):
    text = markdown(CURVES, ["the machine"])
    assert text.startswith("the machine\n")
    assert "| ours | 30 | 3.0 | 0.8800 | 0.9000 | 2.0 |" in text
    assert "| monai | 15 | 3.1 | 0.7000 | 0.7000 | 3.1 |" in text
    assert minutes_to(CURVES["monai"], 0.8) is None
    assert dice_limits(CURVES) == pytest.approx((0.65, 0.92))
    assert dice_limits(CURVES | {"other": [Point(60, 1, 0.3)]}) == pytest.approx((0.25, 0.92))
    plot(CURVES, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_validations_of_a_run_are_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": 5},
        {"kind": "validation", "step": 5, "mean_dice": 0.4},
        {"kind": "validation_average", "step": 5, "mean_dice": 0.3},
        {"kind": "validation", "step": 7, "mean_dice": None},
        {"kind": "validation", "step": 9, "mean_dice": 0.5},
        {"kind": "validation_average", "step": 9, "mean_dice": 0.6},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    # The last record is written in two pieces.
    parts = iter([lines[:100], lines[:-10], lines])

    def poll():
        part = next(parts, None)
        if part is not None:
            path.write_text(part)
        return None if part is not None else 0

    points = list(_follow(types.SimpleNamespace(poll=poll), path, 0.0))
    assert [(point.step, point.dice) for point in points] == [(5, 0.4), (9, 0.6)]
    assert points[0].seconds < points[1].seconds


def test_a_rival_is_validated_evenly_and_off_the_clock(tmp_path, monkeypatch):
    ticks = itertools.count()
    now = [0.0]
    shares = []
    monkeypatch.setattr(learning_torch.time, "perf_counter", lambda: now[0])

    def step(share):
        shares.append(share)
        # Steps become slower on the way.
        now[0] += 1 if now[0] < 200 else 2
        return 1.0

    def validate():
        now[0] += 100
        return next(ticks) / 10

    rival = types.SimpleNamespace(step=step, validate=validate)
    points = train(rival, 80.0, Clock(), tmp_path / CURVE)
    assert [point.step for point in points] == [10, 20, 25, 30, 35, 40, 45, 50]
    assert [point.seconds for point in points] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert shares[:3] == [0, 1 / 80, 2 / 80]
    assert shares[-1] == 78 / 80
    assert read_curve(tmp_path / CURVE) == points


def test_a_budget_that_is_over_before_training_is_told(tmp_path, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(learning_torch.time, "perf_counter", lambda: next(now))
    with pytest.raises(OptionError, match="--budget: 1 s passed before the first step"):
        train(types.SimpleNamespace(), 0.5, Clock(), tmp_path / CURVE)


@pytest.mark.slow
def test_a_rival_learns_from_the_data_of_a_run(tmp_path):
    options = (
        "--num-phantoms 3 --roi-size 32 32 32 --family monai --patch-size 16 16 16 --num-layers 12 "
        "--hidden-size 12 --num-heads 2 --light-r 8 --learning-rate 1e-2 --flips 0 --workers 1 "
    )
    folders = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    cfg = parse([*options.split(), *folders])
    rival = Rival(cfg, prepare(cfg, make_console(quiet=True)))
    losses = [rival.step(step / 10) for step in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    assert 0 <= rival.validate() <= 1
    rival.close()


def test_bad_options_and_failed_sides_are_told(tmp_path, capsys):
    args = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*args, "--budget", "soon"]) == 2
    assert main([*args, "--sides", "theirs"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    folder = tmp_path / "out" / "ours-5m"
    folder.mkdir(parents=True)
    with pytest.raises(SideFailed, match=r"^ours: failed, .*ours-5m.log says why: "):
        _train(LearningOptions(tmp_path, out=tmp_path / "out"), "ours", folder)


def test_a_side_of_another_run_is_not_taken_for_this_one(tmp_path, monkeypatch, capsys):
    def train(options, side, folder):
        line = json.dumps({"seconds": 60.0, "step": 5, "dice": 0.5})
        (folder / CURVE).write_text(f"{line}\n")
        trained.append(side)

    trained = []
    monkeypatch.setattr("benchmarks.learning._train", train)
    args = ["--sides", "ours", "--out", str(tmp_path / "out"), "--data"]
    assert main([*args, str(tmp_path)]) == 0
    assert main([*args, str(tmp_path)]) == 0
    assert trained == ["ours"]
    capsys.readouterr()
    assert main([*args, str(tmp_path / "other")]) == 1
    assert main([*args, str(tmp_path), "--recipe", "spleen"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert f"was trained with data {tmp_path}, not {tmp_path}/other; take another --out" in first
    assert "was trained with recipe hippocampus, not spleen" in second
    assert trained == ["ours"]
