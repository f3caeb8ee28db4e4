"""The bare state dict inside what a checkpoint held."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from unetr_flax.weights.counters import is_counter
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.recognize import locate

# Entries under which training scripts put a state dict, beside epoch, optimizer and the like.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "module")
MOST_ENTRIES = 2


def unwrap(obj: Any, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Finds the bare state dict in what a checkpoint held, and says what was taken off.

    A state dict may stand under one or two of `ENTRIES`, beside anything else. A prefix is removed
    if the signature of a registered family stands behind it: the prefixes of DataParallel,
    Lightning modules, torch.compile, DeepSpeed or any other wrapper. Counters of training steps
    (`COUNTERS`) are dropped.

    Args:
      obj: content of a file of torch.save or safetensors.
      ignore: glob patterns, such as "loss.*", of further keys to drop, as they stand in the state
        dict or without the prefix.

    Returns:
      Arrays or tensors by key, the same objects, and a description such as "state_dict of a
      checkpoint, prefix 'module.' removed, 1 counter dropped, 2 keys ignored".

    Raises:
      CheckpointError: if there is no state dict or more than one; if keys that are not ignored
        stand beside those of the model; if a pattern of `ignore` matches no key.
    """
    entries, held = _find(obj, ignore, MOST_ENTRIES) or ((), _checked(obj, ignore))
    counters = {key for key, value in held.items() if is_counter(key, value)}
    prefix = _prefix([key for key in held if key not in counters and not _matches(key, ignore)])
    names = {key: key.removeprefix(prefix) if isinstance(key, str) else key for key in held}
    ignored = {
        key for key, name in names.items() if _matches(key, ignore) or _matches(name, ignore)
    }
    for pattern in ignore:
        if not any(_matches(key, [pattern]) for key in (*names, *names.values())):
            raise CheckpointError(f"ignore: {pattern!r} matches no key")
    counters -= ignored
    state_dict = {name: held[key] for key, name in names.items() if key not in counters | ignored}
    if not state_dict:
        raise CheckpointError("holds nothing but what is ignored")
    words = [" of ".join([*reversed(entries), "a checkpoint"]) if entries else "state dict"]
    if prefix:
        words.append(f"prefix {prefix!r} removed")
    if counters:
        words.append(f"{_counted(len(counters), 'counter')} dropped")
    if ignored:
        words.append(f"{_counted(len(ignored), 'key')} ignored")
    return state_dict, ", ".join(words)


def is_array(value: Any) -> bool:
    """Returns whether a value is a tensor or an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _find(
    obj: Any, ignore: Sequence[str], entries_left: int
) -> tuple[tuple[str, ...], Mapping[Any, Any]] | None:
    """Returns the entries that lead to a state dict and the state dict, or None."""
    if not isinstance(obj, Mapping):
        return None
    weights = _weights(obj, ignore)
    if weights and all(isinstance(key, str) and is_array(value) for key, value in weights.items()):
        return (), obj
    if not entries_left:
        return None
    found = {name: _find(obj.get(name), ignore, entries_left - 1) for name in ENTRIES}
    found = {name: inner for name, inner in found.items() if inner}
    if len(found) > 1:
        raise CheckpointError(f"state dicts under {' and '.join(found)}, there must be one")
    for name, (entries, state_dict) in found.items():
        return (name, *entries), state_dict
    return None


def _checked(obj: Any, ignore: Sequence[str]) -> Mapping[Any, Any]:
    """Raises an error that tells what keeps an object from being a state dict."""
    wanted = f"must be arrays by name, or such under {', '.join(ENTRIES)}"
    if not isinstance(obj, Mapping):
        raise CheckpointError(f"holds an object of type {type(obj).__name__}, {wanted}")
    if not obj:
        raise CheckpointError(f"holds nothing, {wanted}")
    inner = next((name for name in ENTRIES if isinstance(obj.get(name), Mapping)), None)
    where = f"{inner}: " if inner else ""
    for key, value in _weights(obj[inner] if inner else obj, ignore).items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where}key {_short(key)} is no string, {wanted}")
        if not is_array(value):
            kind = type(value).__name__
            raise CheckpointError(f"{where}entry {_short(key)} is of type {kind}, {wanted}")
    raise CheckpointError(f"{where}holds nothing, {wanted}")


def _weights(obj: Mapping[Any, Any], ignore: Sequence[str]) -> dict[Any, Any]:
    """Returns the entries that are neither counters nor ignored."""
    return {
        key: value
        for key, value in obj.items()
        if not is_counter(key, value) and not _matches(key, ignore)
    }


def _prefix(keys: Sequence[str]) -> str:
    """Returns what stands before the names of a known model, "" if it is none.

    Raises:
      CheckpointError: if some keys do not have the prefix.
    """
    prefix, _ = locate(keys) or ("", None)
    beside = [key for key in keys if not key.startswith(prefix) or key == prefix]
    if beside:
        more = f" and {len(beside) - 4} more" if len(beside) > 4 else ""
        pattern = beside[0].partition(".")[0] + ".*" * ("." in beside[0])
        raise CheckpointError(
            f"beside the model's keys {prefix}* there are {', '.join(beside[:4])}{more}; ignore "
            f"them if they are no part of the model (--ignore '{pattern}')"
        )
    return prefix


def _matches(key: Any, patterns: Sequence[str]) -> bool:
    return isinstance(key, str) and any(fnmatch.fnmatchcase(key, each) for each in patterns)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _short(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 80 else text[:77] + "..."
