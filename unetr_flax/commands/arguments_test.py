import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from unetr_flax.commands.arguments import positionals_first


@dataclasses.dataclass(frozen=True)
class Options:
    flag: bool = False
    one: str | None = None
    two_numbers: tuple[int, int] | None = None
    many: tuple[str, ...] | None = None
    each: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()


def verb(paths: Annotated[tuple[Path, ...], tyro.conf.Positional], options: Options) -> None:
    pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a b", "a b"),
        ("a --flag b", "a b --flag"),
        ("--no-flag a --one x b --one=y c", "a b c --no-flag --one x --one=y"),
        (
            "a --two-numbers 1 -2 b --two_numbers 3 4 c",
            "a b c --two-numbers 1 -2 --two_numbers 3 4",
        ),
        ("a --many x y --flag b", "a b --many x y --flag"),
        ("a --many --flag b", "a b --many --flag"),
        ("--many x -- a -b", "--many x -- a -b"),
        ("a --many x -- b --one", "--many x -- a b --one"),
        ("--each x a --each y b", "a b --each x --each y"),
        ("a -h --unknown b", "a b -h --unknown"),
        ("a --", "a"),
    ],
)
def test_positional_arguments_come_first(given, expected):
    assert positionals_first(verb, given.split()) == expected.split()
