import dataclasses
import json
from pathlib import Path

import pytest

from train.command_line import DATA, PHANTOMS, parse
from train.config import OPTIONS_BEFORE_NAMES, Config
from train.options import (
    AugmentationOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    option,
)

RECORDS = (
    DataOptions,
    ModelOptions,
    LossOptions,
    AugmentationOptions,
    TrainingOptions,
    RunOptions,
)


def help_text(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "129")  # one column, and long lines
    with pytest.raises(SystemExit) as exit_info:
        parse([*args, "--help"])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    lines = [line.strip("│| ") for line in help_text([], capsys, monkeypatch).splitlines()]
    for record in RECORDS:
        for field in dataclasses.fields(record):
            names = [line.partition(" ")[0].rstrip(",") for line in lines]
            start = names.index(option(field.name))
            # The explanation ends before the next option.
            rest = [line.startswith("--") for line in lines[start + 1 :]] + [True]
            end = start + 1 + rest.index(True)
            text = " ".join(lines[start:end])
            default = field.default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert f"(default: {shown})" in text, field.name
            explanation = text.split(option(field.name))[1].split("(default")[0]
            assert len(explanation.split()) > 4, field.name


def test_help_with_data_shows_the_defaults_for_data(capsys, monkeypatch):
    assert DATA.training.epochs != PHANTOMS.training.epochs
    for args in (["--data", "x"], ["--data=x"]):
        text = help_text(args, capsys, monkeypatch)
        assert f"(default: {DATA.training.epochs})" in text
    assert parse(["--data", "x"]).training == DATA.training
    assert parse([]) == PHANTOMS


def test_options_are_flat_and_may_be_several_numbers():
    line = (
        "--roi-size 48 64 48 --patch-size 16 16 8 --light-r 2.5 --spacing 1 1 1.5 --resume "
        "--out runs/x --dtype bfloat16 --learning-rate 3e-4"
    )
    cfg = parse(line.split())
    assert cfg.data.roi_size == (48, 64, 48)
    assert cfg.data.spacing == (1, 1, 1.5)
    assert cfg.model.patch_size == (16, 16, 8)
    assert cfg.model.light_r == 2.5
    assert cfg.model.dtype == "bfloat16"
    assert cfg.training.learning_rate == 3e-4
    assert cfg.run.resume == "yes"
    assert cfg.out == Path("runs/x")


@pytest.mark.parametrize("default", [False, True])
def test_flags_may_be_given_whatever_their_default(default):
    # Defaults are those of a recipe, a plan or a resumed run.
    defaults = dataclasses.replace(
        DATA, data=dataclasses.replace(DATA.data, crop_foreground=default)
    )
    for args, expected in ((["--crop-foreground"], True), (["--no-crop-foreground"], False)):
        assert parse(args, defaults).data.crop_foreground == expected


@pytest.mark.parametrize(
    "args", [["--no-such-option", "3"], ["--epochs", "many"], ["--dtype", "float16"]]
)
def test_what_is_not_understood_ends_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(args)
    assert exit_info.value.code == 2
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--num-phantoms 10001", "--num-phantoms 10001: must be at most 10000"),
        ("--num-folds 1", "--num-folds 1: must be at least 2"),
        ("--num-folds 5 --fold 5", "--fold 5: must be below --num-folds 5"),
        ("--fold 1", "--fold 1: needs --num-folds or --splits"),
        ("--splits a.json --num-folds 5", "--splits a.json: excludes --num-folds"),
        ("--workers 0", "--workers 0: must be above 0"),
        ("--epochs 0", "--epochs 0: must be above 0"),
        ("--val-fraction 1", "--val-fraction 1.0: must be in [0, 1)"),
        ("--overlap 1", "--overlap 1.0: must be in [0, 1)"),
        ("--seed -1", "--seed -1: must not be negative"),
        ("--spacing 1 0 1", "--spacing 1.0 0.0 1.0: each must be from 0.001 to 1000 mm"),
        ("--learning-rate 0", "--learning-rate 0.0: must be above 0"),
        ("--spacing 1e-9 1e-9 1e-9", "--spacing 1e-09 1e-09 1e-09: each must be from 0.001"),
        ("--spacing 1 1 inf", "--spacing 1.0 1.0 inf: must be finite"),
        ("--epochs 1000000000000", "--epochs 1000000000000: must be finite and at most"),
        ("--epochs 2147483648", "--epochs 2147483648: must be at most 2147483647"),
        ("--seed 4294967296", "--seed 4294967296: must be finite and at most 4294967295"),
        ("--loss mse", "--loss mse: must be dice_cross_entropy, dice_focal, cross_entropy or dice"),
        ("--b2 1", "--b2 1.0: must be in [0, 1)"),
        ("--optimizer sgd", "--optimizer sgd: must be adamw or muon"),
        ("--schedule step", "--schedule step: must be cosine, poly or constant"),
        ("--layer-decay 0", "--layer-decay 0.0: must be in (0, 1]"),
        ("--ema-decay 1", "--ema-decay 1.0: must be in [0, 1)"),
        ("--stochastic-depth -0.1", "--stochastic-depth -0.1: must be in [0, 1)"),
        ("--smooth-nr -1", "--smooth-nr -1.0: must not be negative"),
        ("--class-weights 1 -1", "--class-weights 1.0 -1.0: must not be negative"),
        (
            "--accumulate 3 --batch-size 4",
            "--accumulate 3: --batch-size 4 must be divisible by it",
        ),
        ("--augmentation [all]", "--augmentation [all]: must be default, none, nnunet"),
        ("--flips 0 3", "--flips 0 3: must be axes 0, 1 and 2, each at most once"),
        ("--flips 1 1", "--flips 1 1: must be axes 0, 1 and 2, each at most once"),
        ("--flip-probability 1.5", "--flip-probability 1.5: must be in [0, 1]"),
        (
            "--rotate90-probability 0.2 --roi-size 16 32 16",
            "--rotate90-probability 0.2: needs crops of one size along axes 0 and 1, not of 16 x",
        ),
        (
            "--roi-size 16 24 16 --patch-size 16 16 16",
            "--roi-size 16 24 16: each must be divisible by its patch_size=(16, 16, 16)",
        ),
        ("--patch-size 3 8 8", "--patch-size 3 8 8: each must be one of (1, 2, 4, 8, 16)"),
        ("--num-heads 5", "--num-heads 5: must divide hidden_size=96"),
        ("--num-layers 3", "--num-layers 3: must be at least 4"),
        ("--light-r 3", "--light-r 3.0: must be above 0, at most 32 and"),
        ("--dropout-rate 1", "--dropout-rate 1.0: must be in [0, 1)"),
        ("--fsdp 0", "--fsdp 0: must be above 0"),
        ("--depth-shards -1", "--depth-shards -1: must be above 0"),
        ("--num-processes 2", "--coordinator-address None: must be given"),
        ("--process-id 1", "--process-id 1: must be in [0, --num-processes 1)"),
    ],
)
def test_values_out_of_range_are_named(args, message):
    with pytest.raises(ValueError, match=r"^--") as error:
        parse(args.split()).check()
    assert str(error.value).startswith(message)


FLOATS = [f.name for r in RECORDS for f in dataclasses.fields(r) if isinstance(f.default, float)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_may_be_infinite_or_nan(name, value):
    with pytest.raises(ValueError, match=rf"^{option(name)} {value}: must be finite"):
        parse([f"{option(name)}={value}"]).check()


def test_the_steps_of_the_data_must_be_countable():
    cfg = parse(["--epochs", "1000000", "--batch-size", "2"])
    cfg.check()
    cfg.check_length(num_cases=4000)
    with pytest.raises(ValueError, match=r"^--epochs 1000000: must be at most 715827"):
        cfg.check_length(num_cases=6000)


def test_defaults_are_in_range():
    PHANTOMS.check()
    DATA.check()


def test_the_folder_is_named_after_the_data(tmp_path):
    assert PHANTOMS.out == Path("runs/phantoms")
    folder = tmp_path / "Task04"
    assert parse(["--data", str(folder)]).out == Path("runs/Task04")


def test_survives_json_without_run_options(tmp_path):
    cfg = parse(["--data", str(tmp_path), "--roi-size", "16", "32", "16", "--out", "x"])
    restored = Config.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert restored == dataclasses.replace(cfg, run=RunOptions())
    for change in ({"new": 1}, {}):
        values = cfg.to_dict() | change
        if not change:
            del values["epochs"]
        with pytest.raises(ValueError, match="missing or unknown"):
            Config.from_dict(values)


def test_options_that_came_later_have_the_values_of_before():
    values = {k: x for k, x in PHANTOMS.to_dict().items() if k not in OPTIONS_BEFORE_NAMES}
    assert Config.from_dict(values) == PHANTOMS
