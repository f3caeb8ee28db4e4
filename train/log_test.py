import json
import struct

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from train.log import RunLog
from train.scores import Validation
from unetr_flax.evaluation.dice import DiceScores

CLASSES = ("background", "anterior", "posterior")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Returns (tag, step, value) of every scalar in every event file."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            # A record: length, its checksum, the event, its checksum.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_records_reach_both_files_and_the_screen(tmp_path, capsys):
    with RunLog(tmp_path, CLASSES, total_steps=20, steps_per_epoch=5) as log:
        log.step(10, 0.5)
        log.train(10, {"loss": 0.5, "seconds": 2.0})
        log.validation(10, Validation(DiceScores(np.array([0.99, 0.5, np.nan]), 0.5)))
    train, validation = records(tmp_path)
    assert train == {"kind": "train", "epoch": 2, "step": 10, "loss": 0.5, "seconds": 2.0}
    assert validation == {
        "kind": "validation",
        "epoch": 2,
        "step": 10,
        "mean_dice": 0.5,
        "anterior": 0.5,
        "posterior": None,
    }
    written = {(tag, step) for tag, step, _ in events(tmp_path)}
    assert written == {
        ("train/loss", 10),
        ("train/seconds", 10),
        ("validation/mean_dice", 10),
        ("validation/anterior", 10),
        ("validation/posterior", 10),
    }
    assert ("train/loss", 10, 0.5) in events(tmp_path)
    out = capsys.readouterr().out
    assert "epoch 2/4  train  loss 0.5" in out
    assert "anterior 0.5" in out


def test_a_validation_without_cases_is_not_shown(tmp_path, capsys):
    with RunLog(tmp_path, CLASSES, total_steps=20, steps_per_epoch=5) as log:
        log.validation(10, Validation(DiceScores(np.full(3, np.nan), np.nan)))
    assert [record["mean_dice"] for record in records(tmp_path)] == [None]
    assert "validation" not in capsys.readouterr().out


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with RunLog(tmp_path, CLASSES, total_steps=20, steps_per_epoch=5) as log:
        for step in (5, 10, 15):
            log.train(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    with RunLog(tmp_path, CLASSES, total_steps=20, steps_per_epoch=5, step=10) as log:
        log.train(15, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(5, 1), (10, 1), (15, 2)]


def test_validations_that_are_done_again_are_recorded_once(tmp_path):
    scores = Validation(DiceScores(np.array([0.99, 0.5, 0.5]), 0.5))
    for validated_step in (0, 5, 10):
        with RunLog(tmp_path, CLASSES, 20, 5, step=10, validated_step=validated_step) as log:
            for step in (5, 10):
                if validated_step == 0:
                    log.train(step, {"loss": 1.0})
                if validated_step < step:
                    log.validation(step, scores)
                    log.validation(step, scores, "validation_average")
    kinds = ["train", "validation", "validation_average"]
    assert [(r["kind"], r["step"]) for r in records(tmp_path)] == [
        (kind, step) for step in (5, 10) for kind in kinds
    ]


def test_the_last_epoch_may_be_a_part_of_one(tmp_path, capsys):
    with RunLog(tmp_path, CLASSES, total_steps=7, steps_per_epoch=5) as log:
        for step in (5, 7):
            log.train(step, {"loss": 1.0})
        assert log._progress.tasks[0].total == 7
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2]
    assert "epoch 2/2  train" in capsys.readouterr().out


def test_without_folder_nothing_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, CLASSES, total_steps=20, steps_per_epoch=5) as log:
        log.train(5, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
