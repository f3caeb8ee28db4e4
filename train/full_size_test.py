"""The recipe for spleens on CT of full size, from its files to a model, in 6 GiB of memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.data.phantoms import LABELS, make_phantom
from train.data.testing import describe, write
from unetr_flax.weights import load_pretrained

LIMIT = 6 << 30
SPLEEN = LABELS.index("spleen")
# Voxels along the axis of the body, as in Task09 of the Decathlon, and mm per voxel.
SLICES = {31: 5.0, 96: 3.0, 168: 1.8}


def family(pid):
    """Returns a process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [p for child in task.read_text().split() for p in family(int(child))]
    return found


def memory(pid):
    """Returns the bytes of a process, pages that others share in part; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


@pytest.mark.slow
def test_spleen_of_full_size_takes_less_than_6_gib(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    training = []
    for slices, mm in SLICES.items():
        rng = np.random.default_rng(slices)
        grid = (512, 512, slices), (0.8, 0.8, mm)
        image, label, affine = make_phantom(rng, grid, body=(170, 130, 120))
        arrays = {"image": image, "label": (label == SPLEEN).astype(np.uint8)}
        files = {kind: f"{kind}sTr/spleen_{slices}.nii.gz" for kind in arrays}
        for kind, array in arrays.items():
            write(data / files[kind], array, affine)
        training.append(files)
    labels = {"0": "background", "1": "spleen"}
    describe(data, name="Spleen", modality={"0": "CT"}, labels=labels, training=training)
    options = ["--epochs", "1", "--eval-every", "1", "--val-fraction", "0.34"]
    folders = ["--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", "--recipe", "spleen", *options, *folders],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    largest = 0
    while process.poll() is None:
        largest = max(largest, sum(map(memory, family(process.pid))))
        time.sleep(0.5)
    assert process.returncode == 0
    assert 2 << 30 < largest < LIMIT
    config, _ = load_pretrained(tmp_path / "run" / "model")
    assert config.img_size == (96, 96, 96)
