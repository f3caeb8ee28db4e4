"""Command lines whose positional arguments may stand between options."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro


def positionals_first(function: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """Moves the positional arguments of a command line before its options, or all behind a "--".

    tyro reads a list of positional arguments only up to the first option.

    Args:
      function: the verb; its options are the fields of its dataclass parameters.
      args: the command line. An option with a list of values takes all that follow, up to the next
        option or "--".
    """
    counts = _value_counts(function)
    front: list[str] = []
    options: list[str] = []
    # Values that the last option still takes; None for any number.
    left: int | None = 0
    for i, arg in enumerate(args):
        if arg == "--":
            rest = args[i + 1 :]
            # All of them together: tyro reads them in one place only.
            return [*options, "--", *front, *rest] if rest else front + options
        if arg.startswith("--"):
            name, equals, _ = arg.partition("=")
            left = 0 if equals else counts.get(name.replace("_", "-"), 0)
            options.append(arg)
        elif left == 0:
            # Short options such as -h stay where they are.
            (options if arg.startswith("-") else front).append(arg)
        else:
            options.append(arg)
            left = None if left is None else left - 1
    return front + options


def _value_counts(function: Callable[..., Any]) -> dict[str, int | None]:
    """Counts the values that each option takes; None for any number."""
    hints = typing.get_type_hints(function)
    groups = [hints[name] for name in inspect.signature(function).parameters]
    return {
        f"--{field.name.replace('_', '-')}": _values(
            typing.get_type_hints(group, include_extras=True)[field.name]
        )
        for group in groups
        if dataclasses.is_dataclass(group)
        for field in dataclasses.fields(group)
    }


def _values(hint: Any) -> int | None:
    if typing.get_origin(hint) is Annotated:
        hint, *marks = typing.get_args(hint)
        if tyro.conf.UseAppendAction in marks:
            # Each occurrence of the option takes one item of the tuple.
            return 1
    if typing.get_origin(hint) in (Union, types.UnionType):
        [hint] = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if hint is bool:
        return 0
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return None if Ellipsis in items else len(items)
    return 1
