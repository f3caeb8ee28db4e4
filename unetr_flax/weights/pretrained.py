"""Pretrained models in folders: config.json and model.safetensors.

The header of model.safetensors holds the configuration too, so that replacing this one file is
what makes a save happen; config.json is a copy for readers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.atomic import commit, staged, sync
from unetr_flax.weights.convert import WeightsError, check_fit, flax_shapes, plain_tree
from unetr_flax.weights.files import FLOATS, read_arrays, read_header
from unetr_flax.weights.unwrap import CheckpointError

FORMAT = "unetr_flax"
VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FIELDS = ("config", "preprocessing", "provenance")


def save_pretrained(
    path: Path | str,
    cfg: UNETRConfig,
    variables: Mapping[str, Any],
    *,
    preprocessing: Any = None,
    provenance: Any = None,
) -> None:
    """Saves a model in a folder, which is made if need be; an older model there is replaced.

    Whenever the process is killed, the folder loads: as the older model or as this one.

    Args:
      path: the folder.
      cfg: the model's configuration.
      variables: all its variables, arrays of jax or numpy; dtypes are kept.
      preprocessing: how images become the model's input, anything that JSON can hold.
      provenance: where the weights came from, anything that JSON can hold.

    Raises:
      WeightsError: if the variables do not fit the configuration, or a leaf is not finite or not
        of floating numbers; nothing is written.
      CheckpointError: if JSON cannot hold what is given, or the path is no folder.
      OSError: if the files cannot be written.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": cfg.to_dict(),
        "preprocessing": preprocessing,
        "provenance": provenance,
    }
    for name in FIELDS:
        try:
            json.dumps(header[name], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {name} cannot be written as JSON ({error})") from None
    leaves = {
        "/".join(names): np.asarray(leaf, order="C")
        for names, leaf in traverse_util.flatten_dict(jax.device_get(plain_tree(variables))).items()
    }
    _check_leaves(leaves, cfg, f"{path}: variables")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{path}: must be a folder, there is a file") from None
    weights, config = path / WEIGHTS_NAME, path / CONFIG_NAME
    with staged(weights) as new_weights, staged(config) as new_config:
        metadata = {FORMAT: json.dumps(header)}
        new_weights.write_bytes(safetensors.numpy.save(leaves, metadata))
        new_config.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        sync(new_weights)
        sync(new_config)
        # Without config.json either model.safetensors is complete by itself.
        config.unlink(missing_ok=True)
        sync(path)
        commit(new_weights, weights)
        commit(new_config, config)


def load_pretrained(path: Path | str) -> tuple[UNETRConfig, dict[str, Any]]:
    """The configuration and the variables, as numpy arrays, that `save_pretrained` wrote.

    Args:
      path: the folder.

    Raises:
      CheckpointError: if the folder or the file is missing, damaged, of another format or version,
        or if config.json differs from the header of model.safetensors.
      WeightsError: naming every leaf that is missing, unexpected, of another shape, not finite or
        not of floating numbers.
      ValueError: if the configuration describes no model.
    """
    weights = _weights_file(Path(path))
    leaves, metadata = read_arrays(weights)
    header = _header(weights, metadata)
    try:
        cfg = UNETRConfig.from_dict(header["config"])
    except ValueError as error:
        raise CheckpointError(f"{weights}: config: {error}") from None
    _check_leaves(leaves, cfg, str(weights))
    return cfg, traverse_util.unflatten_dict(leaves, sep="/")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """{"config": ..., "preprocessing": ..., "provenance": ...} of a folder, as JSON has them.

    Args:
      path: the folder.

    Raises:
      CheckpointError: as `load_pretrained`.
    """
    weights = _weights_file(Path(path))
    header = _header(weights, read_header(weights))
    return {name: header[name] for name in FIELDS}


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        what = "a file, must be a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what} with {WEIGHTS_NAME}")
    return path / WEIGHTS_NAME


def _header(weights: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header of the weights' file says, which config.json beside it must say too."""
    if FORMAT not in metadata:
        raise CheckpointError(f"{weights}: not from save_pretrained (no {FORMAT} in its header)")
    header = _parsed(metadata[FORMAT], weights)
    config = weights.with_name(CONFIG_NAME)
    try:
        copy = _parsed(config.read_text(encoding="utf-8"), config)
    except FileNotFoundError:
        return header
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config}: cannot be read ({error})") from None
    ours, theirs = _flat(header), _flat(copy)
    differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differ:
        raise CheckpointError(
            f"{config}: differs from the header of {weights.name} in {', '.join(differ)}; "
            "the header counts, remove or correct config.json"
        )
    return header


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """The JSON of a header or of config.json, of this format and version."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}")
    if header.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {header.get('version')!r}, must be {VERSION}")
    fields = {"format", "version", *FIELDS}
    if header.keys() != fields or not isinstance(header["config"], dict):
        raise CheckpointError(f"{path}: fields {sorted(header)}, must be {sorted(fields)}")
    return header


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name, compared as text so that 1, 1.0 and true differ."""
    flat = {}
    for key, value in header.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _check_leaves(leaves: Mapping[str, np.ndarray], cfg: UNETRConfig, what: str) -> None:
    """Raises one error if names, shapes, dtypes or values do not fit the model."""
    expected = {"/".join(names): shape for names, shape in flax_shapes(cfg).items()}
    check_fit({name: leaf.shape for name, leaf in leaves.items()}, expected, what)
    for name, leaf in leaves.items():
        if leaf.dtype.name not in FLOATS:
            allowed = ", ".join(FLOATS)
            raise WeightsError(f"{what}: {name} is {leaf.dtype.name}, must be one of {allowed}")
        broken = int((~np.isfinite(leaf)).sum())
        if broken:
            raise WeightsError(
                f"{what}: {name}: {broken} of {leaf.size} numbers are NaN or infinite, "
                "all must be finite"
            )
