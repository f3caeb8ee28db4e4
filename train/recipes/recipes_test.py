import dataclasses
from pathlib import Path

import pytest

from train import recipes
from train.command_line import DATA, PHANTOMS, default_config, parse
from train.config import Config
from train.data.preprocess import make_preprocessing
from train.optim import learning_rate_schedule
from train.options import RECIPE_NAMES
from unetr_flax import UNETRConfig
from unetr_flax.imaging.presets import PRESETS


def recipe(name, *args):
    cfg = parse(["--recipe", name, "--data", "x", *args])
    cfg.check()
    return cfg


def test_every_file_is_a_recipe():
    files = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")}
    names = {name.replace("-", "_") for name in RECIPE_NAMES}
    assert files == names | {"__init__", "recipes_test"}


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_sets_defaults_that_the_command_line_changes(name):
    cfg = recipe(name)
    assert cfg.training.recipe == name
    changed = recipe(name, "--learning-rate", "0.5")
    assert changed.training.learning_rate == 0.5
    assert changed.model == cfg.model
    # A resumed run reads the recipe's options, and its name, from its own record.
    assert Config.from_dict(cfg.to_dict()).training == cfg.training


@pytest.mark.parametrize(
    ("name", "preset", "modalities"),
    [
        ("btcv-paper", "btcv", ["CT"]),
        ("btcv-monai", "btcv", ["CT"]),
        ("spleen", "spleen", ["CT"]),
        ("hippocampus", "hippocampus", ["MRI"]),
    ],
)
def test_scans_are_prepared_as_the_preset_says(name, preset, modalities):
    data = recipe(name).data
    preprocessing = make_preprocessing(
        modalities,
        PRESETS[preset].labels,
        spacing=data.spacing,
        window=data.window,
        crop_foreground=data.crop_foreground,
    )
    assert preprocessing == PRESETS[preset]


def test_little_time_is_for_more_steps_of_a_smaller_model():
    full, short = (recipe("hippocampus", "--budget", budget) for budget in ("8m", "479s"))
    assert full.model == recipe("hippocampus").model
    assert short.model.light_r == 2 * full.model.light_r
    assert dataclasses.replace(short, model=full.model, training=full.training) == full
    assert recipe("hippocampus", "--budget", "5m", "--light-r", "4").model == full.model
    with pytest.raises(ValueError, match=r"^--budget soon: "):
        recipe("hippocampus", "--budget", "soon")


def test_btcv_s_model_is_monai_s_default():
    model_config = recipe("btcv-paper").model_config(in_channels=1, out_channels=14)
    assert model_config == UNETRConfig.monai((96, 96, 96), 1, 14)


def test_the_paper_s_schedule_takes_as_many_steps():
    cfg = recipe("btcv-paper")
    steps = cfg.steps_per_epoch(24) * cfg.training.epochs
    # 5,000 epochs of 24 cases, one case a step.
    assert steps == 5000 * 24
    training = cfg.training
    schedule = learning_rate_schedule(training.learning_rate, steps, training.warmup_fraction)
    assert 0 < schedule(0) < 1e-6
    assert schedule(50 * 24 - 1) == pytest.approx(1e-4)
    monai = recipe("btcv-monai")
    steps = monai.steps_per_epoch(24) * monai.training.epochs
    assert steps == pytest.approx(25_000, rel=1e-3)


def test_without_a_recipe_the_defaults_are_those_of_before():
    assert default_config([]) == PHANTOMS
    assert default_config(["--data=x"]) == DATA


def test_an_unknown_recipe_is_one_line():
    with pytest.raises(ValueError, match=r"^--recipe pancreas: must be hippocampus, spleen"):
        parse(["--recipe", "pancreas"]).check()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--num-layers 8", "--num-layers 8: must be 12 for --family monai"),
        ("--patch-size 8 8 8", "--patch-size 8 8 8: must be 16 16 16 for --family monai"),
        ("--light-r 3.5", "--light-r 3.5: 32 divided by it must be a whole number"),
        ("--window 100 100", "--window 100.0 100.0: the first must be below the second"),
    ],
)
def test_what_monai_s_model_cannot_have_is_named(args, message):
    with pytest.raises(ValueError, match=r"^--") as error:
        recipe("spleen", *args.split())
    assert str(error.value).startswith(message)


def test_a_window_needs_a_ct():
    with pytest.raises(ValueError, match="--window: needs a channel named CT, there are T1, T2"):
        make_preprocessing(["T1", "T2"], [], spacing=None, window=(0.0, 1.0))
