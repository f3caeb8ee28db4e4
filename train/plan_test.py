import dataclasses
import json

import numpy as np
import pytest

from train.command_line import DATA, parse
from train.data.fingerprint import Fingerprint, take_fingerprint
from train.data.layouts import read_dataset
from train.data.testing import write_boxes
from train.plan import make_plan, plan_options
from train.plan_sizes import crop_size
from train.plan_stages import Device

CPU = Device("cpu", 16 << 30, 1)
GPU = Device("gpu", 40 << 30, 2)


@pytest.fixture
def abdomen():
    """CT of 30 people with thick slices, of different spacings."""
    rng = np.random.default_rng(0)
    spacings = np.stack([*[rng.uniform(0.7, 0.9, 30)] * 2, rng.uniform(3, 8, 30)], axis=-1)
    shapes = np.tile([512, 512, 100], (30, 1))
    # Around the body, five planes on each side have nothing but air.
    planes = [np.pad(np.full(n - 10, 100.0), 5, constant_values=-1000.0) for n in shapes[0]]
    outline = np.concatenate([[-1024.0], *planes])[:, None]
    labels = ("background", "spleen", "left_kidney")
    fractions = (0.98, 0.015, 0.005)
    return Fingerprint(
        30, ("CT",), labels, shapes, spacings, (outline,) * 30, (-40.5,), (199.2,), fractions
    )


def plan(fingerprint, device, *args):
    """Returns the options of a plan, and the reason of each."""
    choices, cfg = make_plan(fingerprint, device, [*args])
    cfg.check()
    return cfg, {choice.name: choice.reason for choice in choices}


def test_anisotropic_ct_on_a_gpu(abdomen):
    cfg, _ = plan(abdomen, GPU)
    x, y, z = cfg.data.spacing
    assert x == y == pytest.approx(np.median(abdomen.spacings[:, 0]), rel=0.01)
    # The coarse axis keeps the detail of the finest tenth of the scans.
    assert z == pytest.approx(np.percentile(abdomen.spacings[:, 2], 10), rel=0.01)
    assert cfg.data.window == (-41.0, 200.0)
    assert cfg.augmentation.flips == ()
    assert cfg.augmentation.augmentation == "nnunet"
    assert not cfg.data.crop_foreground
    assert cfg.model.family == "monai"
    assert cfg.data.batch_size == 2
    # As large as they may be in plane; slices of about 100 x 5.5 mm are fewer.
    assert cfg.data.roi_size[:2] == (160, 160)
    assert 128 <= cfg.data.roi_size[2] <= 160


def test_the_same_data_on_cpu_get_a_small_model(abdomen):
    cfg, _ = plan(abdomen, CPU)
    assert cfg.model == dataclasses.replace(DATA.model, patch_size=(8, 8, 8), light_r=4.0)
    assert cfg.augmentation.augmentation == "strong"
    assert (cfg.training.optimizer, cfg.training.b2) == ("muon", 0.98)
    assert cfg.training.weight_decay == 0.3
    assert max(cfg.data.roi_size) <= 96
    assert cfg.training.eval_every * 5 <= cfg.training.epochs
    assert cfg.training.ema_decay == pytest.approx(1 - 20 / 2000, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "channels", "args", "patch", "hidden_size"),
    [
        (40, 1, [], 4, 48),
        (40, 4, [], 4, 96),
        (40, 1, ["--patch-size", "8", "8", "8"], 8, 96),
        (60, 1, [], 8, 96),
        (60, 1, ["--spacing", "2", "2", "2"], 4, 48),
    ],
)
def test_small_cases_on_cpu_get_small_patches(abdomen, size, channels, args, patch, hidden_size):
    small = dataclasses.replace(
        abdomen,
        modalities=("MRI",) * channels,
        shapes=np.full((30, 3), size),
        spacings=np.ones((30, 3)),
        # Nothing to crop: every plane is brighter than the darkest voxel.
        outlines=(np.repeat([[0.0], *[[1.0]] * 3 * size], channels, axis=1),) * 30,
        low=(0.0,) * channels,
        high=(1.0,) * channels,
    )
    cfg, _ = plan(small, CPU, *args)
    assert cfg.model.patch_size == (patch,) * 3
    assert (cfg.model.hidden_size, cfg.model.num_heads) == (hidden_size, hidden_size // 24)


@pytest.mark.parametrize(
    ("device", "args", "hidden_size", "num_heads", "reasons"),
    [
        (CPU, "--hidden-size 384", 384, 16, {"num_heads": "of 24 numbers each"}),
        (CPU, "--hidden-size 110", 110, 2, {"num_heads": "of 55 numbers each"}),
        (CPU, "--hidden-size 10", 10, 1, {"num_heads": "of 10 numbers each"}),
        (CPU, "--num-heads 3", 96, 3, {"hidden_size": "a patch has 512 numbers"}),
        (
            CPU,
            "--num-heads 7",
            98,
            7,
            {"hidden_size": "a patch has 512 numbers, rounded up from 96 for --num-heads 7"},
        ),
        (GPU, "", 768, 12, {"num_heads": "of 64 numbers each"}),
        (GPU, "--hidden-size 384", 384, 6, {"num_heads": "of 64 numbers each"}),
    ],
)
def test_heads_and_width_follow_each_other(abdomen, device, args, hidden_size, num_heads, reasons):
    cfg, found = plan(abdomen, device, *args.split())
    assert (cfg.model.hidden_size, cfg.model.num_heads) == (hidden_size, num_heads)
    assert found | reasons == found


@pytest.mark.parametrize(
    ("device", "args", "family", "patch"),
    [
        (CPU, "--family monai", "monai", (16, 16, 16)),
        (GPU, "--family monai", "monai", (16, 16, 16)),
        (GPU, "--patch-size 8 8 8", "reference", (8, 8, 8)),
        (GPU, "--num-layers 4", "reference", (16, 16, 16)),
        (GPU, "--light-r 3.2", "monai", (16, 16, 16)),
        (GPU, "--roi-size 64 96 64", "monai", (16, 16, 16)),
        (GPU, "--roi-size 36 56 64", "reference", (4, 8, 16)),
        (CPU, "--roi-size 36 52 36", "reference", (4, 4, 4)),
        (CPU, "--roi-size 96 96 92", "reference", (8, 8, 4)),
        (CPU, "--roi-size 96 96 96", "reference", (8, 8, 8)),
    ],
)
def test_family_and_patches_fit_what_is_given(abdomen, device, args, family, patch):
    cfg, reasons = plan(abdomen, device, *args.split())
    assert (cfg.model.family, cfg.model.patch_size) == (family, patch)
    assert cfg.model.num_layers == 12 or family == "reference"
    if family == "reference" and device is GPU:
        assert reasons["family"] == "MONAI's UNETR has patches of 16 voxels and 12 layers"


def test_less_memory_and_more_volumes_make_smaller_crops(abdomen):
    little = dataclasses.replace(CPU, memory=2 << 30)
    sizes = [
        np.prod(plan(abdomen, device, "--batch-size", volumes)[0].data.roi_size)
        for device, volumes in ((CPU, "2"), (little, "2"), (little, "8"))
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_cropping_and_crops_follow_the_window(abdomen):
    # A body of 40 planes along each axis, in a fog that a low window shows.
    planes = [np.where(np.arange(n) < 40, 100.0, -500.0) for n in abdomen.shapes[0]]
    outline = np.concatenate([[-1024.0], *planes])[:, None]
    foggy = dataclasses.replace(abdomen, spacings=np.ones((30, 3)), outlines=(outline,) * 30)
    cfg, reasons = plan(foggy, CPU)
    assert cfg.data.crop_foreground
    assert cfg.data.roi_size == (40, 40, 40)
    assert reasons["roi_size"] == "the median case has 40 x 40 x 40 voxels"
    cfg, reasons = plan(foggy, CPU, "--window", "-600", "200")
    assert not cfg.data.crop_foreground
    assert reasons["crop_foreground"] == "the box of the foreground fills 100 % of the median scan"
    assert reasons["roi_size"] == "the median case has 512 x 512 x 100 voxels"


def test_batches_are_divided_by_devices_and_accumulation(abdomen):
    cfg, reasons = plan(abdomen, GPU, "--accumulate", "3")
    assert cfg.data.batch_size == 6
    assert reasons["batch_size"].startswith("the least for 2 device(s) and --accumulate 3 that")
    # Parts of a batch take the memory of a part.
    little = dataclasses.replace(CPU, memory=2 << 30)
    whole, parts = (
        plan(abdomen, little, "--batch-size", "4", "--accumulate", n)[0] for n in ("1", "4")
    )
    assert np.prod(parts.data.roi_size) > np.prod(whole.data.roi_size)


def test_devices_that_share_volumes_have_whole_patches_of_them(abdomen):
    eight = dataclasses.replace(GPU, count=8)
    alone, _ = plan(abdomen, eight)
    shared, reasons = plan(abdomen, eight, "--depth-shards", "4")
    assert (alone.data.batch_size, shared.data.batch_size) == (8, 2)
    assert reasons["batch_size"].startswith("the least for 8 device(s), 4 to a volume, that")
    assert reasons["roi_size"].endswith(" voxels, and 4 devices share a crop")
    assert shared.data.roi_size[0] == 128
    # Little memory is that of four devices for a crop.
    little = dataclasses.replace(CPU, memory=1 << 29, count=4)
    alone, shared = (
        np.prod(plan(abdomen, little, "--depth-shards", n)[0].data.roi_size) for n in ("1", "4")
    )
    assert shared > 2 * alone


def test_a_budget_takes_the_place_of_epochs(abdomen):
    for budget, decay, reason in (
        ("15m", 0.9889, "weights are averaged over 90 of the about 1800 steps that 15m may have"),
        ("9s", 0.0, "the about 18 steps that 9s may have are too few to average weights over"),
    ):
        cfg, reasons = plan(abdomen, CPU, "--budget", budget)
        assert not {"epochs", "eval_every"} & reasons.keys()
        assert cfg.training.ema_decay == decay
        assert reasons["ema_decay"] == reason


def test_the_steps_of_the_epochs_are_told(abdomen):
    many = dataclasses.replace(abdomen, num_train=3000)
    for fingerprint, epochs, told in (
        (abdomen, 134, "2010 steps of 2 crops"),
        (
            many,
            5,
            "7500 steps of 2 crops; fewer epochs would leave no room for 5 validations",
        ),
    ):
        cfg, reasons = plan(fingerprint, CPU)
        assert cfg.training.epochs == epochs
        assert reasons["epochs"] == told


@pytest.mark.parametrize(
    ("epochs", "eval_every", "validations", "ema_decay"),
    [
        (20, 4, "5 validation(s)", 0.9333),
        (7, 1, "7 validation(s)", 0.8095),
        (1, 1, "1 validation(s)", 0.0),
        (10**6, 200_000, "5 validation(s)", 0.9999),
    ],
)
def test_validations_and_average_follow_the_epochs(
    abdomen, epochs, eval_every, validations, ema_decay
):
    cfg, reasons = plan(abdomen, CPU, "--epochs", str(epochs))
    assert cfg.training.eval_every == eval_every
    assert reasons["eval_every"] == validations
    assert cfg.training.ema_decay == ema_decay


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
        image[4:12, 6:18, 4:12] = np.resize((50, 100, 150), (8, 12, 8))
        label = np.zeros(image.shape, np.uint8)
        label[6:10, 8:12, 6:9] = 1
        image[label == 1] = 100 + i
        cases.append((image, label))
    return write_boxes(tmp_path, cases, "MRI", np.diag([1.0, 1.0, 2.0, 1.0]))


def test_the_fingerprint_of_files(folder):
    fingerprint = take_fingerprint(read_dataset(folder), num_train=4)
    assert fingerprint.num_train == 4
    assert len(fingerprint.shapes) == 5
    np.testing.assert_array_equal(fingerprint.shapes[0], (20, 24, 16))
    np.testing.assert_allclose(fingerprint.spacings[0], (1, 1, 2))
    np.testing.assert_array_equal(fingerprint.boxes(None)[0], (8, 12, 8))
    assert fingerprint.filled(None) == 0.1
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
    assert lines[0].startswith("intensities of MRI: normalized")
    assert all(line.startswith("--") for line in lines[1:])


@pytest.mark.parametrize(
    ("args", "num_train"),
    [([], 4), (["--val-fraction", "0"], 5), (["--num-folds", "2"], 2), (["--splits"], 3)],
)
def test_epochs_have_the_steps_of_the_split(folder, tmp_path, args, num_train):
    if args == ["--splits"]:
        path = tmp_path / "splits.json"
        names = [f"box_{i}" for i in range(5)]
        path.write_text(json.dumps([{"train": names[:3], "val": names[3:]}]))
        args = ["--splits", str(path)]
    args = ["--data", str(folder), "--batch-size", "1", *args]
    cfg, _ = plan_options(args, parse(args))
    assert cfg.training.epochs == -(-2000 // num_train)


def test_no_plan_for_recipes_phantoms_and_resumed_runs(folder):
    for args in (
        ["--data", str(folder), "--recipe", "hippocampus"],
        ["--data", str(folder), "--resume"],
        [],
        ["--data", str(folder / "nowhere")],
        ["--data", str(folder), "--num-folds", "6"],
    ):
        cfg = parse(args)
        assert plan_options(args, cfg) == (cfg, [])


def test_all_processes_plan_for_the_one_with_the_least_memory(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "train.plan_stages.process_min", lambda memory: asked.append(memory) or 2 << 30
    )
    assert Device.here().memory == 2 << 30
    assert asked.pop() > 0
    # One that cannot read the data does not leave the others waiting.
    for path in (folder, folder / "nowhere"):
        args = ["--data", str(path)]
        plan_options(args, parse(args))
    assert len(asked) == 2
