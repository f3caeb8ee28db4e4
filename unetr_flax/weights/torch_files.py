"""Files of torch.save, read without executing anything; the one module here that needs torch."""

import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from unetr_flax.weights.unwrap import CheckpointError, first_line

ZIP_MAGIC = b"PK"
PICKLE_MAGICS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))

# What a user can run on a file whose author is trusted, to get one that holds tensors only.
RESAVE = (
    "import torch; from safetensors.torch import save_file; {load}; "
    "save_file({{k: v.clone().contiguous() for k, v in o.items() if torch.is_tensor(v)}}, {out!r})"
)
LOAD_PICKLE = (
    "o = torch.load(open({path!r}, 'rb'), map_location='cpu', weights_only=False); "
    "o = next((o[k] for k in ('state_dict', 'model_state_dict', 'model', 'net') if k in o), o) "
    "if isinstance(o, dict) else o; o = o if isinstance(o, dict) else o.state_dict()"
)
LOAD_SCRIPT = "o = torch.jit.load({path!r}, map_location='cpu').state_dict()"


def is_torch(head: bytes) -> bool:
    """Whether a file that begins with these nine bytes is one of torch.save, not of safetensors."""
    return head[:2] in (ZIP_MAGIC, *PICKLE_MAGICS) and head[8:] != b"{"


def read_torch(path: Path, file: BinaryIO) -> Any:
    """What torch.save wrote, if that is tensors and plain Python values.

    Args:
      path: the file, for messages.
      file: the same, opened.

    Raises:
      CheckpointError: if torch is not installed, if the file is damaged or no file of torch.save,
        or if loading it would run code; the message then says how to save its tensors elsewhere.
    """
    torch = import_torch(path)
    _check_archive(path, file)
    try:
        # What torch says of pickle protocols and the like is no concern of the reader.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise CheckpointError(
                f"{path}: holds {found[1]} and not only tensors, and is not run; "
                + _resave(path, LOAD_PICKLE)
            ) from None
        reason = text.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [text]
        raise CheckpointError(
            f"{path}: not a file of tensors by torch.save ({reason[0]})"
        ) from None
    # What a damaged file raises in torch has no class in common.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged, or not a file of torch.save ({first_line(error)})"
        ) from None


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Refuses zip archives of other things, damaged ones, and such as would grow when read."""
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
            f"{path}: a TorchScript program and not only tensors, and is not run; "
            + _resave(path, LOAD_SCRIPT)
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but not of torch.save (no data.pkl in it)")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(f"{path}: a compressed zip archive, torch.save does not compress")
    for record in records:
        # torch.load does not compare checksums, zipfile does; torch writes 0 for one not computed.
        if record.CRC:
            with archive.open(record) as data:
                while data.read(2**20):
                    pass


def to_tensor(value: Any) -> Any:
    """An array as a tensor of its own memory, in its own dtype; a tensor as it is.

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
    """A tensor without gradient, attributes and pending negation, of memory that is there.

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
    # The class's method: a file can give a tensor attributes that hide its own.
    return torch.Tensor.detach(tensor).resolve_neg()


def import_torch(path: Path | None = None) -> types.ModuleType:
    """The package, only where it is needed.

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


def _resave(path: Path, load: str) -> str:
    out = path.with_name(path.name + ".safetensors")
    code = RESAVE.format(load=load.format(path=str(path)), out=str(out))
    # In double quotes, because the code has single ones.
    code = re.sub(r'([\\"$`])', r"\\\1", code)
    return f'only if you trust its author, save its tensors by: python -c "{code}"'
