"""The command line of a run, and the defaults of its options: a recipe's, or those for data."""

import dataclasses
import importlib
from collections.abc import Sequence

import tyro

from train.budget import seconds
from train.checks import MONAI_SIZES
from train.config import Config
from train.options import RECIPE_NAMES, TrainingOptions

PHANTOMS = Config()
DATA = Config(training=TrainingOptions(epochs=12, eval_every=4, learning_rate=2e-3))


def default_config(args: list[str]) -> Config:
    """Returns the defaults for a command line: its recipe's, or those for data or for phantoms."""
    name = _value_of("--recipe", args)
    if name in RECIPE_NAMES:
        recipe = _recipe(name, _value_of("--budget", args))
        defaults = dataclasses.replace(
            recipe, training=dataclasses.replace(recipe.training, recipe=name)
        )
    else:
        defaults = PHANTOMS if _value_of("--data", args) is None else DATA
    return with_family(defaults, args)


def with_family(defaults: Config, args: list[str]) -> Config:
    """Returns defaults with the sizes of MONAI's UNETR if the command line asks for that family."""
    if _value_of("--family", args) != "monai":
        return defaults
    return dataclasses.replace(defaults, model=dataclasses.replace(defaults.model, **MONAI_SIZES))


def parse(args: list[str], defaults: Config | None = None) -> Config:
    """Reads options from the command line.

    Args:
      args: the command line without the program's name.
      defaults: values of options that are not given; see `default_config` if None.

    Raises:
      SystemExit: with status 2, after saying what is wrong, if an option is not understood; with
        status 0 after --help.
    """
    if defaults is None:
        defaults = default_config(args)
    return tyro.cli(
        Config,
        prog="python -m train",
        args=_with_value_of_resume(args),
        default=defaults,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def given(args: Sequence[str]) -> set[str]:
    """Returns the names of the options that a command line gives, as those of their fields."""
    names = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    return {name[2:].removeprefix("no-").replace("-", "_") for name in names}


def _recipe(name: str, budget: str | None) -> Config:
    """Returns a recipe, as it is for runs of a given time if it says so."""
    module = importlib.import_module(f"train.recipes.{name.replace('-', '_')}")
    if budget is None or not hasattr(module, "for_budget"):
        return module.RECIPE
    try:
        return module.for_budget(seconds(budget))
    except ValueError:
        # What is wrong with the budget is told when all options are judged.
        return module.RECIPE


def _with_value_of_resume(args: list[str]) -> list[str]:
    """Writes "--resume" without a value as "--resume yes"."""
    written = []
    for i, arg in enumerate(args):
        written.append(arg)
        if arg == "--resume" and (i + 1 == len(args) or args[i + 1].startswith("--")):
            written.append("yes")
    return written


def _value_of(name: str, args: list[str]) -> str | None:
    """Finds the value of an option in a command line; None if it is not given."""
    for i, arg in enumerate(args):
        if arg.startswith(name + "="):
            return arg.removeprefix(name + "=")
        if arg == name:
            return args[i + 1] if i + 1 < len(args) else ""
    return None
