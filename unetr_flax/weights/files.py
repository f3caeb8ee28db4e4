"""State dicts in files of safetensors and of torch.save; nothing in them is ever executed."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from unetr_flax.runtime.atomic import commit, staged, sync
from unetr_flax.weights.convert import to_numpy
from unetr_flax.weights.errors import CheckpointError, first_line
from unetr_flax.weights.torch_files import (
    import_torch,
    is_torch,
    plain_tensor,
    read_torch,
    to_tensor,
)
from unetr_flax.weights.unwrap import unwrap

SAFETENSORS_ENDING = ".safetensors"
TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")

FLOATS = ("float16", "bfloat16", "float32", "float64")
BITS = (8, 16, 32, 64)

# dtypes by their names in the header of safetensors. All that numpy has can be read, since counters
# and ignored keys, which are dropped before weights must be of `FLOATS`, may have any.
SAFETENSORS_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    **{f"{sign}{bits}": np.dtype(f"{sign.lower()}{bits // 8}") for sign in "IU" for bits in BITS},
}


@dataclasses.dataclass(frozen=True)
class StateDictFile:
    """The content of a file of weights.

    Attributes:
      state_dict: by key, numpy arrays from safetensors, CPU tensors from torch.save; all finite.
      description: the unwrapped and dropped parts, in words, as `unwrap` returns them.
      metadata: texts by name in the header of safetensors; empty for torch.save.
    """

    state_dict: dict[str, Any]
    description: str
    metadata: dict[str, str]


def read_state_dict(path: Path | str, ignore: Sequence[str] = ()) -> StateDictFile:
    """Reads the state dict in a file of safetensors or torch.save; its content says which.

    Args:
      path: the file. A file of torch.save needs torch, and may hold tensors and plain Python values
        only (torch.load with weights_only=True).
      ignore: glob patterns of keys that are no part of the model, as for `unwrap`.

    Raises:
      CheckpointError: if the file is missing, damaged or neither of the two; if reading it would
        need to run code that it brings; if it holds no state dict, keys that do not belong to it,
        or none that a pattern matches (see `unwrap`); if a tensor is not of floating numbers, not
        finite, or claims more numbers than are stored.
    """
    path = Path(path)
    with _opened(path) as file:
        head = file.read(9)
        file.seek(0)
        if is_torch(head):
            obj, metadata = read_torch(path, file), {}
        elif head[8:] == b"{" or path.suffix.lower() == SAFETENSORS_ENDING:
            obj, metadata = _read_safetensors(path, file)
        else:
            what = "neither safetensors nor a file of torch.save" if head else "an empty file"
            raise CheckpointError(f"{path}: {what}")
    try:
        state_dict, description = unwrap(obj, ignore)
        state_dict = _checked(state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # A file can make tensors whose every method fails.
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a state dict of tensors ({first_line(error)})"
        ) from None
    return StateDictFile(state_dict, description, metadata)


def write_state_dict(
    path: Path | str, state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict; the file is replaced whole or, if anything fails, left as it was.

    Args:
      path: ends in .safetensors, or in .pt, .pth, .ckpt or .bin for a plain dict of tensors by
        torch.save, which needs torch.
      state_dict: arrays of numpy or jax, or tensors, by key, and counters; dtypes are kept.
      metadata: texts by name for the header of safetensors; torch.save has no place for them.

    Raises:
      CheckpointError: if the ending is another, if torch is needed and missing, if the folder does
        not exist, or if `read_state_dict` would refuse the values.
      OSError: if the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending != SAFETENSORS_ENDING and ending not in TORCH_ENDINGS:
        raise CheckpointError(
            f"{path}: must end in {', '.join((SAFETENSORS_ENDING, *TORCH_ENDINGS))}"
        )
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: no folder {path.parent}")
    try:
        weights, _ = unwrap(state_dict)
        if not weights.keys() <= state_dict.keys():
            raise CheckpointError("must be a bare state dict, without a prefix on every key")
        plain = {k: v.cpu() if hasattr(v, "cpu") else v for k, v in state_dict.items()}
        plain |= _checked({key: plain[key] for key in weights})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: not written, {error}") from None
    with staged(path) as temporary:
        if ending == SAFETENSORS_ENDING:
            arrays = {k: np.asarray(to_numpy(v), order="C") for k, v in plain.items()}
            temporary.write_bytes(safetensors.numpy.save(arrays, dict(metadata or {})))
        else:
            torch = import_torch(path)
            torch.save({key: to_tensor(value) for key, value in plain.items()}, temporary)
        sync(temporary)
        commit(temporary, path)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads all arrays of a file of safetensors, and the texts of its header, as they are.

    Raises:
      CheckpointError: if the file is missing or damaged, or holds an unknown dtype.
    """
    with _opened(path) as file:
        return _read_safetensors(path, file)


def read_header(path: Path) -> dict[str, str]:
    """Reads the texts in the header of a file of safetensors, without its arrays.

    Raises:
      CheckpointError: if the file is missing or damaged.
    """
    with _opened(path):
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: damaged safetensors ({first_line(error)})") from None


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, must be a file of safetensors or torch.save")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({first_line(error)})") from None


def _read_safetensors(path: Path, file: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        data = file.read()
        found = dict(safetensors.deserialize(data))
    except (safetensors.SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged safetensors ({first_line(error)})") from None
    arrays = {}
    for key, entry in found.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path}: {key} is {entry['dtype']}, must be one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        dtype = SAFETENSORS_DTYPES[entry["dtype"]].newbyteorder("<")
        arrays[key] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    # safetensors has checked the header, whose length is its first eight bytes.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def _checked(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state dict with plain tensors; raises an error for the first unusable value."""
    checked, broken = {}, {}
    for key, value in state_dict.items():
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in FLOATS:
            raise CheckpointError(f"{key} is {dtype}, must be one of {', '.join(FLOATS)}")
        if hasattr(value, "detach"):
            checked[key] = plain_tensor(key, value)
            count = int((~checked[key].isfinite()).sum())
        else:
            checked[key] = value
            count = int((~np.isfinite(value)).sum())
        if count:
            broken[key] = count
    if broken:
        first, count = next(iter(broken.items()))
        others = f", and some in {len(broken) - 1} other entries" if len(broken) > 1 else ""
        raise CheckpointError(
            f"{first}: {count} of {math.prod(state_dict[first].shape)} numbers are NaN or infinite"
            f"{others}; all must be finite"
        )
    return checked
