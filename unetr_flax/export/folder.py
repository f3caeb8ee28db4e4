"""The folder of an exported model, which appears whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from unetr_flax.export.errors import ExportError
from unetr_flax.runtime.atomic import sync

MANIFEST = "export.json"
STABLEHLO = "model.stablehlo"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
# The suffix is the choice of PyTorch's exporter.
ONNX_WEIGHTS = f"{ONNX}.data"
FILES = (MANIFEST, STABLEHLO, WEIGHTS, ONNX, ONNX_WEIGHTS)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes its place at the end if nothing fails.

    Args:
      path: the folder that is to appear.
      overwrite: whether to replace an older export there.

    Raises:
      ExportError: if `path` is there already and must not be replaced, or has files that no export
        wrote, which are never replaced.
      OSError: if the folder cannot be made or moved to its place.
    """
    path = path.resolve()
    _check_replaceable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}"
    temporary, old = path.with_name(f"{name}.tmp"), path.with_name(f"{name}.old")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        # An error or an interrupt can come between the two renames.
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise ExportError(f"{path}: is there already; --overwrite replaces it")
    if not path.is_dir():
        raise ExportError(f"{path}: is a file, must be a folder")
    names = sorted(file.name for file in path.iterdir())
    # A model folder can consist of model.safetensors alone.
    others = [name for name in names if name not in FILES or MANIFEST not in names]
    if others:
        raise ExportError(
            f"{path}: holds {others[0]!r}, which no export wrote; nothing there is replaced"
        )
