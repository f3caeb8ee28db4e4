"""Parses the arguments of `UNETRConfig` and its presets; errors name argument, value and rule."""

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from unetr_flax.model.choices import Norm
from unetr_flax.model.decoder_spec import NUM_STAGES


def reference_channels(light_r: float) -> tuple[int, ...]:
    """Returns the widths 64..512 divided by light_r, truncated as in the reference."""
    full = tuple(32 * 2**i for i in range(NUM_STAGES + 2))
    if not isinstance(light_r, bool) and light_r > 0 and math.isfinite(light_r):
        channels = tuple(int(width / light_r) for width in full)
        doubling = all(2 * a == b for a, b in itertools.pairwise(channels[1:]))
        if channels[0] >= 1 and doubling:
            return channels[1:-1]
    raise ValueError(
        f"light_r={light_r!r}: must be above 0, at most {full[0]} and leave each of the widths "
        f"{full[1:]} twice the one before, as 1, 2, 4, 8, 16 and 32 do"
    )


def monai_norm(norm_name: str | tuple[str, Mapping[str, Any]]) -> tuple[Norm, int | None, bool]:
    """Parses MONAI's `norm_name` to the fields norm, norm_groups and norm_affine."""
    name, options = (norm_name, {}) if isinstance(norm_name, str) else norm_name
    name, options = name.lower(), dict(options)
    one_of("norm_name", name, ("instance", "batch", "group"))
    affine = options.pop("affine", name != "instance")
    groups = options.pop("num_groups", None) if name == "group" else None
    if options:
        raise ValueError(
            f"norm_name={norm_name}: {sorted(options)} cannot be given, only 'affine' and, for "
            "group, 'num_groups'"
        )
    return cast(Norm, name), groups, affine


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError if a value is none of those that are allowed."""
    if value not in tuple(allowed):
        raise ValueError(f"{name}={value!r}: must be {' or '.join(map(repr, allowed))}")


def integer(name: str, value: Any) -> int:
    """Returns a positive integer as int; raises ValueError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be a positive integer") from None
    if number < 1:
        raise ValueError(f"{name}={value!r}: must be a positive integer")
    return number


def integers(name: str, values: Any) -> tuple[int, ...]:
    """Returns a sequence of positive integers as tuple; raises ValueError for anything else."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
        raise ValueError(f"{name}={values!r}: must be a sequence of positive integers")
    return tuple(integer(name, value) for value in values)
