"""The bare state dict inside what a checkpoint held."""

from collections.abc import Mapping
from typing import Any

# Entries under which training scripts put a state dict, beside epoch, optimizer and the like.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")
MOST_ENTRIES = 2

# What wrappers put before every key: DataParallel and DDP, Lightning modules, torch.compile.
PREFIXES = ("module.", "model.", "net.", "_model.", "network.", "_orig_mod.")

# A Lightning module saves these beside its model, and no model has modules of such names.
NOT_OF_A_MODEL = ("loss", "criterion", "metric")


class CheckpointError(ValueError):
    """A file or object that cannot be used as a checkpoint; the message is one line."""


def unwrap(obj: Any) -> tuple[dict[str, Any], str]:
    """The bare state dict in what a checkpoint held, and in words what was unwrapped.

    A state dict may stand under one or two of `ENTRIES` beside anything else. A prefix of
    `PREFIXES` is removed, repeatedly, where every key has it.

    Args:
      obj: what a file of torch.save or safetensors held.

    Returns:
      Arrays or tensors by key, the same objects, and a description such as
      "state_dict of a checkpoint, prefix 'module.' removed".

    Raises:
      CheckpointError: if there is no state dict or more than one, or if keys of a loss or metric
        stand beside those of a model; the message names them.
    """
    entries, state_dict = _find(obj, MOST_ENTRIES) or ((), _checked(obj))
    words = [" of ".join([*reversed(entries), "a checkpoint"]) if entries else "state dict"]
    removed = []
    while prefix := _common_prefix(state_dict):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        removed.append(repr(prefix))
    if removed:
        words.append(f"{'prefix' if len(removed) == 1 else 'prefixes'} {' '.join(removed)} removed")
    return dict(state_dict), ", ".join(words)


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__


def _find(obj: Any, entries_left: int) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """The entries that lead to a state dict and the state dict, or None."""
    if not isinstance(obj, Mapping):
        return None
    if obj and all(isinstance(key, str) and is_array(value) for key, value in obj.items()):
        return (), obj
    if not entries_left:
        return None
    found = {name: _find(obj.get(name), entries_left - 1) for name in ENTRIES}
    found = {name: inner for name, inner in found.items() if inner}
    if len(found) > 1:
        raise CheckpointError(f"state dicts under {' and '.join(found)}, there must be one")
    for name, (entries, state_dict) in found.items():
        return (name, *entries), state_dict
    return None


def _checked(obj: Any) -> Mapping[str, Any]:
    """Tells what keeps an object from being a state dict."""
    wanted = f"must be arrays by name, or such under {', '.join(ENTRIES)}"
    if not isinstance(obj, Mapping):
        raise CheckpointError(f"holds an object of type {type(obj).__name__}, {wanted}")
    if not obj:
        raise CheckpointError(f"holds nothing, {wanted}")
    inner = next((name for name in ENTRIES if isinstance(obj.get(name), Mapping)), None)
    where = f"{inner}: " if inner else ""
    for key, value in obj[inner].items() if inner else obj.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where}key {_short(key)} is no string, {wanted}")
        if not is_array(value):
            kind = type(value).__name__
            raise CheckpointError(f"{where}entry {_short(key)} is of type {kind}, {wanted}")
    raise CheckpointError(f"{where}holds nothing, {wanted}")


def _common_prefix(state_dict: Mapping[str, Any]) -> str | None:
    """The prefix that every key has, if any.

    Raises:
      CheckpointError: if only keys of a loss or metric lack it.
    """
    for prefix in PREFIXES:
        others = [key for key in state_dict if not key.startswith(prefix) or key == prefix]
        if not others:
            return prefix
        if len(others) < len(state_dict) and all(_not_of_a_model(key) for key in others):
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            raise CheckpointError(
                f"beside the model's keys {prefix}* there are {', '.join(others[:4])}{more}; "
                "remove them from the state dict"
            )
    return None


def _not_of_a_model(key: str) -> bool:
    return any(word in key.partition(".")[0].lower() for word in NOT_OF_A_MODEL)


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 80 else text[:77] + "..."
