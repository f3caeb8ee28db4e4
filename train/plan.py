"""The plan of a run without a recipe: options that follow from a fingerprint of the data.

Options on the command line come before those of the plan, whose rules are in `train.plan_stages`.
"""

import dataclasses
from collections.abc import Sequence

from train.command_line import DATA, parse, with_family
from train.config import Config
from train.data.dataset import DataError
from train.data.fingerprint import Fingerprint, take_fingerprint
from train.options import option
from train.plan_stages import STAGES, Choice, Device
from train.run_dir import OptionError
from train.task import read_run_dataset, split_cases


def plan_options(args: list[str], cfg: Config) -> tuple[Config, list[str]]:
    """Plans a run by its data, unless it has a recipe or no data, or is resumed.

    Args:
      args: the command line, whose options come before those of the plan.
      cfg: the options of the command line, see `train.run_dir.read_options`.

    Returns:
      The options; and the plan, a line for each choice, empty if nothing was planned.

    Raises:
      OptionError: if the options of the command line do not go with each other or with the data.
    """
    if cfg.data.data is None or not cfg.is_planned:
        return cfg, []
    device = Device.here()
    try:
        dataset = read_run_dataset(cfg.data.data, cfg)
        train_cases, _ = split_cases(dataset, cfg)
    except DataError:
        # The run reads the data again and tells what is wrong.
        return cfg, []
    fingerprint = take_fingerprint(dataset, len(train_cases))
    if fingerprint is None:
        return cfg, []
    choices, planned = make_plan(fingerprint, device, args)
    planned = dataclasses.replace(planned, run=cfg.run)
    try:
        planned.check()
    except ValueError as error:
        raise OptionError(str(error)) from None
    return planned, [*intensities(fingerprint), *describe(choices, planned)]


def make_plan(
    fingerprint: Fingerprint, device: Device, args: list[str]
) -> tuple[list[Choice], Config]:
    """Chooses options stage by stage, each by the options so far with those of the command line.

    Args:
      fingerprint: measurements of the data.
      device: what training runs on.
      args: the command line.

    Returns:
      The choices; and the options that follow from them and from the command line.
    """
    choices: list[Choice] = []
    defaults = with_family(DATA, args)
    cfg = parse(args, defaults)
    for stage in STAGES:
        choices += stage(fingerprint, device, cfg)
        cfg = parse(args, apply(choices, defaults))
    return choices, cfg


def apply(choices: Sequence[Choice], cfg: Config) -> Config:
    """Returns options with those of a plan in their places."""
    for choice in choices:
        record = dataclasses.replace(getattr(cfg, choice.record), **{choice.name: choice.value})
        cfg = dataclasses.replace(cfg, **{choice.record: record})
    return cfg


def describe(choices: Sequence[Choice], cfg: Config) -> list[str]:
    """Lists the choices that the options follow, with reasons, and those of the command line."""
    lines = []
    for choice in choices:
        value = getattr(getattr(cfg, choice.record), choice.name)
        reason = choice.reason if value == choice.value else "given on the command line"
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"{option(choice.name)} {shown or 'none'}: {reason}")
    return lines


def intensities(fingerprint: Fingerprint) -> list[str]:
    """Lists how the intensities of each channel are normalized, with reasons."""
    windowed = "windowed, as Hounsfield units are the same in all scans"
    relative = "normalized by each volume's own percentiles, as only CT has calibrated units"
    return [
        f"intensities of {name}: {windowed if is_windowed else relative}"
        for name, is_windowed in zip(fingerprint.modalities, fingerprint.windowed, strict=True)
    ]
