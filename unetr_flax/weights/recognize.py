"""Whose model a state dict is of, and behind which prefix its keys stand."""

import re
from collections.abc import Iterable

from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families import FAMILIES, Family


def locate(keys: Iterable[str]) -> tuple[str, Family] | None:
    """Finds the prefix behind which keys have the signature of a registered family.

    Args:
      keys: keys of a state dict.

    Returns:
      The prefix, "" or such as "module.", and the family; None if no key has a signature.

    Raises:
      CheckpointError: if there are signatures behind several prefixes, so several models.
    """
    found: dict[str, Family] = {}
    for key in keys:
        prefixes = {
            match[1]: family
            for family in FAMILIES.values()
            if (match := re.match(rf"((?:.*?\.)?){re.escape(family.signature)}", key))
        }
        if prefixes:
            # One family's signature may end with another's; the longer one leaves less before it.
            prefix = min(prefixes, key=len)
            found.setdefault(prefix, prefixes[prefix])
    if len(found) > 1:
        first, second, *_ = found
        raise CheckpointError(
            f"there are models behind {first!r} and {second!r}, there must be one; ignore the "
            f"others (--ignore '{second or first}*')"
        )
    return next(iter(found.items()), None)


def recognize(keys: Iterable[str]) -> Family:
    """Returns the family of a bare state dict.

    Args:
      keys: keys of a state dict, without the prefixes of wrappers.

    Raises:
      CheckpointError: if no registered family has such keys.
    """
    keys = list(keys)
    match locate(keys):
        case ("", family):
            return family
    known = ", ".join(f"{family.signature}* ({name})" for name, family in FAMILIES.items())
    raise CheckpointError(
        f"state dict: not a known UNETR; keys must be like {known}, but are like "
        f"{', '.join(keys[:3])}"
    )
