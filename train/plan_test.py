import dataclasses

import numpy as np
import pytest

from train.command_line import DATA, parse
from train.data.fingerprint import Fingerprint, take_fingerprint
from train.data.layouts import read_dataset
from train.data.testing import write_boxes
from train.plan import Device, apply, crop_size, plan_first, plan_options, plan_second

CPU = Device("cpu", 16 << 30, 1)
GPU = Device("gpu", 40 << 30, 2)


@pytest.fixture
def abdomen():
    """CT of 30 people with thick slices, of different spacings."""
    rng = np.random.default_rng(0)
    spacings = np.stack([*[rng.uniform(0.7, 0.9, 30)] * 2, rng.uniform(3, 8, 30)], axis=-1)
    shapes = np.tile([512, 512, 100], (30, 1))
    labels = ("background", "spleen", "left_kidney")
    fractions = (0.98, 0.015, 0.005)
    return Fingerprint(
        30, ("CT",), labels, shapes, spacings, shapes - 10, (-40.5,), (199.2,), fractions
    )


def values(choices):
    return {choice.name: choice.value for choice in choices}


def test_anisotropic_ct_on_a_gpu(abdomen):
    first = plan_first(abdomen, GPU)
    plan = values(first)
    x, y, z = plan["spacing"]
    assert x == y == pytest.approx(np.median(abdomen.spacings[:, 0]), rel=0.01)
    # The coarse axis keeps the detail of the finest tenth of the scans.
    assert z == pytest.approx(np.percentile(abdomen.spacings[:, 2], 10), rel=0.01)
    assert plan["window"] == (-41.0, 200.0)
    assert plan["flips"] == ()
    assert plan["augmentation"] == "nnunet"
    assert not plan["crop_foreground"]
    assert plan["family"] == "monai"
    cfg = apply(first, DATA)
    cfg = apply(plan_second(abdomen, GPU, cfg), cfg)
    cfg.check()
    assert cfg.data.batch_size == 2
    # As large as they may be in plane; slices of about 100 x 5.5 mm are fewer.
    assert cfg.data.roi_size[:2] == (160, 160)
    assert 128 <= cfg.data.roi_size[2] <= 160


def test_the_same_data_on_cpu_get_a_small_model(abdomen):
    first = plan_first(abdomen, CPU)
    cfg = apply(first, DATA)
    assert cfg.model == dataclasses.replace(DATA.model, patch_size=(8, 8, 8), light_r=4.0)
    assert cfg.augmentation.augmentation == "strong"
    assert (cfg.training.optimizer, cfg.training.b2) == ("muon", 0.98)
    assert cfg.training.weight_decay == 0.3
    second = values(plan_second(abdomen, CPU, cfg))
    assert max(second["roi_size"]) <= 96
    assert second["eval_every"] * 5 <= second["epochs"]
    assert second["ema_decay"] == pytest.approx(1 - 20 / 2000, abs=1e-3)


def test_less_memory_and_more_volumes_make_smaller_crops(abdomen):
    cfg = apply(plan_first(abdomen, CPU), DATA)
    little = dataclasses.replace(CPU, memory=2 << 30)
    sizes = [
        np.prod(values(plan_second(abdomen, device, c))["roi_size"])
        for device, c in (
            (CPU, cfg),
            (little, cfg),
            (little, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=8))),
        )
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("shape", "largest", "voxels", "expected"),
    [
        ((35, 50, 36), 96, 1e9, (40, 56, 40)),
        ((300, 300, 20), 96, 1e9, (96, 96, 24)),
        ((64, 64, 32), 96, 64 * 64 * 16, (48, 56, 24)),
        ((4, 4, 4), 96, 1, (8, 8, 8)),
    ],
)
def test_crops_hold_a_case_as_far_as_memory_allows(shape, largest, voxels, expected):
    size = crop_size(shape, (8, 8, 8), largest, voxels)
    assert size == expected
    assert np.prod(size) <= max(voxels, 8**3)


@pytest.fixture
def folder(tmp_path):
    """Five MRI of one spacing, mostly empty, with one label each."""
    cases = []
    for i in range(5):
        image = np.zeros((20, 24, 16), np.float32)
        image[4:12, 6:18, 4:12] = 100 + i
        label = np.zeros(image.shape, np.uint8)
        label[6:10, 8:12, 6:9] = 1
        cases.append((image, label))
    return write_boxes(tmp_path, cases, "MRI", np.diag([1.0, 1.0, 2.0, 1.0]))


def test_the_fingerprint_of_files(folder):
    fingerprint = take_fingerprint(read_dataset(folder))
    assert fingerprint.num_cases == len(fingerprint.shapes) == 5
    np.testing.assert_array_equal(fingerprint.shapes[0], (20, 24, 16))
    np.testing.assert_allclose(fingerprint.spacings[0], (1, 1, 2))
    np.testing.assert_array_equal(fingerprint.boxes[0], (8, 12, 8))
    assert fingerprint.low[0] == pytest.approx(100, abs=0.1)
    assert fingerprint.high[0] == pytest.approx(104, abs=0.1)
    np.testing.assert_allclose(fingerprint.label_fractions[1], 48 / (20 * 24 * 16))


def test_options_of_the_command_line_come_first(folder):
    args = ["--data", str(folder), "--patch-size", "16", "16", "8", "--epochs", "7"]
    cfg, lines = plan_options(args, parse(args))
    assert cfg.training.epochs == 7
    assert cfg.data.crop_foreground
    assert cfg.data.spacing is None
    # The planned crop is made of the patches that were asked for.
    assert cfg.data.roi_size == (16, 16, 8)
    assert "--epochs 7: given on the command line" in lines
    assert "--spacing None: all scans have 1 x 1 x 2 mm" in lines
    assert all(line.startswith("--") for line in lines)


def test_no_plan_for_recipes_phantoms_and_resumed_runs(folder):
    for args in (
        ["--data", str(folder), "--recipe", "hippocampus"],
        ["--data", str(folder), "--resume"],
        [],
        ["--data", str(folder / "nowhere")],
    ):
        cfg = parse(args)
        assert plan_options(args, cfg) == (cfg, [])
