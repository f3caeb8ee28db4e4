"""Options and records of the small runs in tests."""

import json

TIMES = ("seconds", "waiting_for_data")
TINY = ["--num-phantoms", "5", "--roi-size", "16", "32", "16", "--patch-size", "16", "16", "8"]
TINY += ["--light-r", "32", "--hidden-size", "16", "--num-heads", "2", "--eval-every", "2"]
# A plan for data would choose others; without them programs compile faster.
TINY += ["--augmentation", "default", "--flips", "--ema-decay", "0"]
TINY += ["--optimizer", "adamw"]


def records(out):
    """Returns the lines of metrics.jsonl without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: x for k, x in json.loads(line).items() if k not in TIMES} for line in lines]


def snapshot(folder):
    """Returns when each file of a folder was changed."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
