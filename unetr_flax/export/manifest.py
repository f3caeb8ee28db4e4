"""export.json: everything that users of an exported model need to know, for people and programs."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unetr_flax.export.folder import MANIFEST
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.model.config import UNETRConfig

FORMAT = "unetr_flax_export"
VERSION = 1


def write_manifest(
    folder: Path,
    cfg: UNETRConfig,
    *,
    preprocessing: Preprocessing | None,
    provenance: Any,
    command: str,
    program: Mapping[str, Any],
) -> None:
    """Writes export.json.

    Args:
      folder: the folder of the exported model.
      cfg: the model's configuration.
      preprocessing: preparation of a scan for the model; None if unknown.
      provenance: where the weights came from, anything that JSON can hold.
      command: the command that writes the folder anew.
      program: what `write_stablehlo` or `write_onnx` returned.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **program,
        "config": cfg.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "provenance": provenance,
        "written_on": str(datetime.date.today()),
        "write_anew": command,
    }
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
