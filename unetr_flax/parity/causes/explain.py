"""Explanation of a value: which known cause turns a definition into what a model computed."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# Largest max|a - b| / max|b| at which a reading explains a value, by dtype.
EXPLAINED = {"float64": 1e-10, "float32": 1e-5}

# Numbers in a value up to which two causes at a time are tried, some hundreds of pairs.
PAIRS_UP_TO = 2**20

Arrays = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Cause:
    """One known cause: a setting of a definition, at a value that ports get wrong.

    Attributes:
      setting: name of the setting, a keyword of the definition.
      value: its value under this cause.
      text: the cause in words; empty for a value that is another way to compute the right result.
      instead: the value in words where it is the right one; `text` if None.
    """

    setting: str
    value: Any
    text: str
    instead: str | None = None


@dataclasses.dataclass(frozen=True)
class Definition:
    """The definition of a kind of module, and all that is known to go wrong with it.

    Attributes:
      compute: computes the result from float64 arrays in PyTorch's layouts and from settings. It
        raises KeyError or IndexError for an array or number that a setting needs and that is not
        there.
      causes: settings to try, the most usual first.
    """

    compute: Callable[..., torch.Tensor]
    causes: tuple[Cause, ...]

    def text(self, setting: str, value: Any) -> str:
        """Returns a setting's right value in words, empty if there are none for it."""
        for cause in self.causes:
            if cause.setting == setting and cause.value == value:
                return cause.text if cause.instead is None else cause.instead
        return ""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A way to compute a value.

    Attributes:
      text: what is not as defined, in words; empty if all is.
      difference: max|value - computed| / max|computed|.
    """

    text: str
    difference: float


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Computes max|value - expected| / max|expected|; infinite for nan and for other shapes."""
    if value.shape != expected.shape:
        return float("inf")
    scale, difference = expected.abs().max().item(), (value - expected).abs().max().item()
    if difference != difference or scale != scale:
        return float("inf")
    return difference / scale if scale else float(difference > 0)


def read(
    definition: Definition,
    arrays: Arrays,
    right: Mapping[str, Any],
    value: torch.Tensor,
    dtype: str,
) -> Reading | None:
    """Finds out how a value was computed.

    Args:
      definition: the definition of its kind of module.
      arrays: inputs and weights, in PyTorch's layouts.
      right: the settings that the model should have.
      value: what was computed.
      dtype: "float64" or "float32", in which the value was computed.

    Returns:
      The definition itself, one cause or (of values that are not large) two that together give the
      value, or a pattern that any module may show (dropout, rounding to a shorter format); None if
      nothing does.
    """
    wide = {name: array.double() for name, array in arrays.items()}
    value = value.double()
    base = definition.compute(wide, **right)
    difference = relative(value, base)
    if difference <= EXPLAINED[dtype]:
        return Reading("", difference)
    known = [c for c in definition.causes if right.get(c.setting) != c.value]
    pairs = _pairs(known) if value.numel() <= PAIRS_UP_TO else iter(())
    for causes in itertools.chain(_singles(known), pairs):
        reading = _tried(definition, wide, right, causes, value)
        if reading is not None and reading.difference <= EXPLAINED[dtype]:
            return reading
    return _pattern(value, base, dtype)


def _singles(causes: list[Cause]) -> Iterator[tuple[Cause, ...]]:
    return ((cause,) for cause in causes)


def _pairs(causes: list[Cause]) -> Iterator[tuple[Cause, ...]]:
    return (
        pair for pair in itertools.combinations(causes, 2) if pair[0].setting != pair[1].setting
    )


def _tried(
    definition: Definition,
    arrays: Arrays,
    right: Mapping[str, Any],
    causes: tuple[Cause, ...],
    value: torch.Tensor,
) -> Reading | None:
    """Computes a value with causes; None if they do not apply to these arrays."""
    changes = {cause.setting: cause.value for cause in causes}
    try:
        computed = definition.compute(arrays, **{**right, **changes})
    except (LookupError, RuntimeError, ValueError):
        # The arrays have no such axes or numbers, or lack one that the setting needs.
        return None
    words = []
    for cause in causes:
        instead = definition.text(cause.setting, right.get(cause.setting))
        words.append(_contrast(cause.text, instead) if instead else cause.text)
    return Reading(" and ".join(word for word in words if word), relative(value, computed))


def _contrast(text: str, instead: str) -> str:
    """Writes "text instead of instead", without the words that both begin with."""
    words, others = text.split(), instead.split()
    same = 0
    while same < min(len(words), len(others) - 1) and words[same] == others[same]:
        same += 1
    if same and others[same - 1] in ("a", "the"):
        same -= 1
    return f"{text} instead of {' '.join(others[same:])}"


def _pattern(value: torch.Tensor, base: torch.Tensor, dtype: str) -> Reading | None:
    """Recognizes what can happen to the result of any module."""
    if value.shape != base.shape:
        return None
    for short in ("bfloat16", "float16", "float32"):
        rounded = value.to(getattr(torch, short)).double()
        epsilon = torch.finfo(getattr(torch, short)).eps
        # A sum of products in a short format is off by a few of its units in the last place.
        if short != dtype and torch.equal(rounded, value) and relative(value, base) < 16 * epsilon:
            return Reading(f"computed in {short} instead of {dtype}", relative(value, base))
    kept = value != 0
    if 0.02 < kept.double().mean().item() < 0.98:
        factors = value[kept] / base[kept]
        factor = factors.median().item()
        if factor > 1 and relative(value[kept], base[kept] * factor) <= EXPLAINED[dtype]:
            text = f"dropout of rate {1 - 1 / factor:.2g} active (training mode left on)"
            return Reading(text, relative(value[kept], base[kept] * factor))
    nonzero = base != 0
    if nonzero.any():
        factor = (value[nonzero] / base[nonzero]).median().item()
        if relative(value, base * factor) <= EXPLAINED[dtype] and factor:
            return Reading(f"multiplied by {factor:.6g}", relative(value, base * factor))
    return None
