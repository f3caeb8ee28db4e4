"""Files of torch.save, read without executing anything in them."""

import pickle
import re
import shlex
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from unetr_flax.weights.errors import CheckpointError, first_line

ZIP_MAGIC = b"PK"
PICKLE_MAGICS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))

# A program that saves a file's tensors elsewhere, for a user who trusts the file's author.
RESAVE = "only if you trust its author, save its tensors by: python -m unetr_flax.weights.resave {}"


def is_torch(head: bytes) -> bool:
    """Returns whether a file that begins with these nine bytes is of torch.save."""
    return head[:2] in (ZIP_MAGIC, *PICKLE_MAGICS) and head[8:] != b"{"


def read_torch(path: Path, file: BinaryIO) -> Any:
    """Reads what torch.save wrote, if that is tensors and plain Python values.

    Args:
      path: the file, for messages.
      file: the opened file.

    Raises:
      CheckpointError: if torch is not installed, if the file is damaged or no file of torch.save,
        or if loading it would run code; the message then says how to save its tensors elsewhere.
    """
    torch = import_torch(path)
    _check_archive(path, file)
    try:
        # torch warns about pickle protocols and the like, which the user cannot change.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise CheckpointError(
                f"{path}: holds {found[1]} and not only tensors, and is not run; {_resave(path)}"
            ) from None
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [text]
        raise CheckpointError(
            f"{path}: not a file of tensors by torch.save ({reason[0]})"
        ) from None
    # The errors that damaged files raise in torch have no class in common.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged, or not a file of torch.save ({first_line(error)})"
        ) from None


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Refuses zip archives of other things, damaged ones, and those that would grow when read."""
    head = file.read(2)
    file.seek(0)
    if head != ZIP_MAGIC:
        return
    try:
        with zipfile.ZipFile(file) as archive:
            _check_records(path, archive)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged zip archive ({first_line(error)})") from None
    file.seek(0)


def _check_records(path: Path, archive: zipfile.ZipFile) -> None:
    records = archive.infolist()
    # Every record is in one folder, whose name is arbitrary.
    names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript program and not only tensors, and is not run; {_resave(path)}"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but not of torch.save (no data.pkl in it)")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path}: a compressed zip archive, torch.save does not compress")
    for record in records:
        # zipfile compares checksums as it reads, torch.load does not; torch writes 0 for none.
        if record.CRC:
            with archive.open(record) as data:
                while data.read(2**20):
                    pass


def to_tensor(value: Any) -> Any:
    """Copies an array to a tensor of its own dtype; a tensor is detached and not copied.

    Raises:
      CheckpointError: if torch is not installed.
    """
    if hasattr(value, "detach"):
        return value.detach()
    torch = import_torch()
    array = np.array(value, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def plain_tensor(key: str, tensor: Any) -> Any:
    """Returns a tensor without gradient, attributes and pending negation, whose memory is there.

    Args:
      key: its name, for messages.
      tensor: any tensor that torch.load made.

    Raises:
      CheckpointError: if it is sparse, on no CPU, or larger than what is stored of it.
    """
    torch = import_torch()
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{key} is a tensor of layout {tensor.layout} on {tensor.device.type}, "
            f"must be {torch.strided} on cpu"
        )
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise CheckpointError(
            f"{key} {tuple(tensor.shape)} needs {claimed} bytes, {stored} are stored"
        )
    # A file can give a tensor attributes that hide its methods, but not those of the class.
    return torch.Tensor.detach(tensor).resolve_neg()


def import_torch(path: Path | None = None) -> types.ModuleType:
    """Imports torch where it is needed.

    Raises:
      CheckpointError: if it is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        where = f"{path}: " if path else ""
        raise CheckpointError(
            f"{where}files of torch.save need torch: pip install 'unetr-flax[torch]' "
            "(files of safetensors do not)"
        ) from None
    return torch


def _resave(path: Path) -> str:
    return RESAVE.format(shlex.quote(str(path)))
