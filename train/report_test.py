import json

import numpy as np

from train.data.dataset import Dataset
from train.report import write_report
from train.scores import Validation, judge

LABELS = ("background", "left *lobe*", "right|lobe")


def test_a_report_shows_plan_scores_curves_and_pictures(tmp_path):
    label = np.zeros((6, 6, 6), np.int32)
    label[1:4, 1:4, 1:4] = 1
    dataset = Dataset("a", ("CT",), LABELS, ())
    scores = judge(dataset, np.roll(label, 1, 0), label, (1.0, 1.0, 2.0))
    validation = Validation.of_cases(["c_1"], [scores])
    metrics = [
        {"kind": "train", "step": 2, "loss": 1.0, "learning_rate": 0.1},
        {"kind": "train", "step": 4, "loss": None, "learning_rate": 0.1},
        {"kind": "validation", "step": 4, "mean_dice": 0.5},
        {"kind": "validation_average", "step": 4, "mean_dice": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    record = {
        "options": {"learning_rate": 1e-3, "spacing": None, "patch_size": [8, 8, 8]},
        "model": {"img_size": [16, 32, 16]},
        "dataset": {
            "name": "Lobes",
            "labels": LABELS,
            "modalities": ["CT"],
            "validation": ["c_1"],
        },
        "schedule": {"total_steps": 90},
    }
    (tmp_path / "plan.txt").write_text("--epochs 9: long enough\n")
    pictures = [("1. c_1", tmp_path / "worst_01.png")]
    text = write_report(tmp_path, record, validation, 4, pictures).read_text()
    assert text.startswith("# Lobes\n\nBest model: step 4, mean Dice 0.6667 over the 1 validation")
    assert "| left \\*lobe\\* | 0.6667 | 1.0000 | 1.00 | 1 | 0 | 0 |" in text
    assert "| right\\|lobe | nan | nan | nan | 0 | 0 | 0 |" in text
    assert "| \\--learning-rate | 0.001 |" in text or "| --learning-rate | 0.001 |" in text
    assert "| window in voxels | 16 32 16 |" in text
    assert "```\n--epochs 9: long enough\n```\n" in text
    assert "| total\\_steps | 90 |" in text
    assert "![1. c\\_1](worst_01.png)" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
