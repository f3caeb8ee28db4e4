"""python -m unetr_flax.weights.resave FILE: saves the tensors of an unsafe file as safetensors.

Loading such a file runs the code in it, so only a user who trusts its author should do this. The
tensors are written to FILE.safetensors, unwrapped as `unetr convert` does.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unetr_flax.weights.errors import CheckpointError, first_line
from unetr_flax.weights.files import write_state_dict
from unetr_flax.weights.torch_files import import_torch
from unetr_flax.weights.unwrap import unwrap

# Containers nested deeper than this are no checkpoints, and may hold themselves.
MOST_LEVELS = 4


def resave(path: Path, ignore: Sequence[str] = ()) -> tuple[Path, str]:
    """Loads a file of torch.save or torch.jit.save, running its code, and saves its tensors.

    Args:
      path: the file: a state dict or a checkpoint around one, a whole module, or TorchScript.
      ignore: patterns of names to leave out, see `unwrap`.

    Returns:
      The path of the new file, `path` with ".safetensors" added, and what was unwrapped.

    Raises:
      CheckpointError: if the file cannot be loaded, holds no state dict or several, or if the new
        file exists already; nothing is written.
      OSError: if the new file cannot be written.
    """
    out = path.with_name(path.name + ".safetensors")
    if out.exists():
        raise CheckpointError(f"{out}: is there already, remove it first")
    torch = import_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            obj = torch.load(path, map_location="cpu", weights_only=False)
    # The file's own code can raise anything.
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be loaded ({first_line(error)})") from None
    try:
        state_dict, description = unwrap(_tensors(obj), ignore)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    write_state_dict(out, state_dict)
    return out, description


def _tensors(obj: Any, levels: int = MOST_LEVELS) -> Any:
    """Reduces what was loaded to mappings of arrays; a module becomes its state dict."""
    torch = import_torch()
    if isinstance(obj, torch.nn.Module):
        return _tensors(obj.state_dict(), levels=0)
    if not isinstance(obj, Mapping):
        return obj
    kept = {}
    for key, value in obj.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            kept[key] = value
        elif levels and isinstance(value, Mapping | torch.nn.Module):
            kept[key] = _tensors(value, levels - 1)
    return kept


def main(arguments: list[str]) -> int:
    """Runs the command line.

    Returns:
      0; or 2 after one line that says why nothing was saved.

    Raises:
      SystemExit: with status 2, if the arguments are not understood.
    """
    parser = argparse.ArgumentParser(
        prog="python -m unetr_flax.weights.resave",
        description="Save the tensors of a file whose author you trust; the code in it is run.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names to leave out, such as 'loss.*'; may be given several times",
    )
    options = parser.parse_args(arguments)
    print(f"warning: running the code in {options.file}", file=sys.stderr)
    try:
        out, description = resave(options.file, options.ignore)
    except (CheckpointError, OSError) as error:
        print(f"resave: {error}", file=sys.stderr)
        return 2
    print(f"{out}: written ({description})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
