"""Models in folders: config.json and model.safetensors.

The header of model.safetensors holds the configuration too, so a save happens at the moment this
one file is replaced; config.json is a copy for readers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.model.config import UNETRConfig
from unetr_flax.runtime.atomic import commit, staged, sync
from unetr_flax.weights.convert import WeightsError, check_fit, flax_shapes, plain_tree
from unetr_flax.weights.files import FLOATS, read_arrays, read_header
from unetr_flax.weights.unwrap import CheckpointError

FORMAT = "unetr_flax"
# Version 1 differs in its preprocessing, which could be any JSON.
VERSION = 2
READABLE_VERSIONS = (1, 2)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FIELDS = ("config", "preprocessing", "provenance")


class Metadata(TypedDict):
    """The content of a model folder besides the weights.

    Attributes:
      config: the model's configuration.
      preprocessing: preparation of a scan for the model; None if unknown.
      provenance: where the weights came from, as JSON has it.
    """

    config: UNETRConfig
    preprocessing: Preprocessing | None
    provenance: Any


def save_pretrained(
    path: Path | str,
    cfg: UNETRConfig,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    provenance: Any = None,
) -> None:
    """Saves a model in a folder, which is made if need be; an older model there is replaced.

    Whenever the process is killed, the folder loads: as the older model or as this one.

    Args:
      path: the folder.
      cfg: the model's configuration.
      variables: all variables of the model, arrays of jax or numpy; dtypes are kept.
      preprocessing: preparation of a scan for the model; None if unknown.
      provenance: where the weights came from, anything that JSON can hold.

    Raises:
      WeightsError: if the variables do not fit the configuration, or a leaf is not finite or not
        of floating-point numbers; nothing is written.
      CheckpointError: if the preprocessing does not fit the configuration, if JSON cannot hold the
        provenance, or if the path is no folder.
      OSError: if the files cannot be written.
    """
    path = Path(path)
    if preprocessing is not None:
        if not isinstance(preprocessing, Preprocessing):
            raise CheckpointError(
                f"{path}: preprocessing is of type {type(preprocessing).__name__}, must be a "
                "Preprocessing or None"
            )
        _check_preprocessing(preprocessing, cfg, path)
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: provenance cannot be written as JSON ({error})") from None
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": cfg.to_dict(),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "provenance": provenance,
    }
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
    # Of a full disk the inner one is told, and the weights are the larger file.
    with staged(config) as new_config, staged(weights) as new_weights:
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
    """Loads the configuration and the variables, as numpy arrays, that `save_pretrained` wrote.

    Args:
      path: the folder.

    Raises:
      CheckpointError: if the folder or the file is missing, damaged, of another format or version;
        if the configuration describes no model or the preprocessing is not valid; or if
        config.json differs from the header of model.safetensors.
      WeightsError: naming every leaf that is missing, unexpected, of another shape, not finite or
        not of floating-point numbers.
    """
    weights = _weights_file(Path(path))
    leaves, header = read_arrays(weights)
    cfg = _metadata(weights, header)["config"]
    _check_leaves(leaves, cfg, str(weights))
    return cfg, traverse_util.unflatten_dict(leaves, sep="/")


def read_metadata(path: Path | str) -> Metadata:
    """Reads the configuration, the preprocessing and the provenance of a folder, not the weights.

    Args:
      path: the folder.

    Raises:
      CheckpointError: as for `load_pretrained`.
    """
    weights = _weights_file(Path(path))
    return _metadata(weights, read_header(weights))


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        what = "a file, must be a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {what} with {WEIGHTS_NAME}")
    return path / WEIGHTS_NAME


def _metadata(weights: Path, header: Mapping[str, str]) -> Metadata:
    """Builds the metadata from the header of the weights' file and checks them."""
    fields = _read_fields(weights, header)
    try:
        cfg = UNETRConfig.from_dict(fields["config"])
    except ValueError as error:
        raise CheckpointError(f"{weights}: config: {error}") from None
    try:
        read = _preprocessing_of_version_1 if fields["version"] == 1 else _preprocessing
        preprocessing = read(fields["preprocessing"])
    except ValueError as error:
        raise CheckpointError(f"{weights}: preprocessing: {error}") from None
    if preprocessing is not None:
        _check_preprocessing(preprocessing, cfg, weights)
    return {"config": cfg, "preprocessing": preprocessing, "provenance": fields["provenance"]}


def _preprocessing(values: Any) -> Preprocessing | None:
    return None if values is None else Preprocessing.from_dict(values)


def _preprocessing_of_version_1(values: Any) -> Preprocessing | None:
    """Builds the preprocessing of a header of version 1.

    Training wrote these three fields, and the rules followed from the names of the modalities.
    Other JSON was free text for people: no preprocessing can be built from it.
    """
    if not isinstance(values, dict) or values.keys() != {"modalities", "spacing", "labels"}:
        return None
    return Preprocessing.from_modalities(
        values["modalities"], labels=values["labels"], spacing=values["spacing"]
    )


def _check_preprocessing(preprocessing: Preprocessing, cfg: UNETRConfig, path: Path) -> None:
    """Raises if the names of channels and classes are not as many as the model has."""
    for name, number, what in (
        ("modalities", cfg.in_channels, "input channel"),
        ("labels", cfg.out_channels, "class"),
    ):
        names = getattr(preprocessing, name)
        if names and len(names) != number:
            raise CheckpointError(
                f"{path}: preprocessing: {name}={names!r}: must be {number}, one per {what} of "
                "the model"
            )


def _read_fields(weights: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Reads the fields of the header, which config.json beside it must have too."""
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
    """Parses the JSON of a header or of config.json and checks its format, version and fields."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}")
    version = header.get("version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        allowed = " or ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{path}: version {version!r}, must be {allowed}")
    fields = {"format", "version", *FIELDS}
    if header.keys() != fields or not isinstance(header["config"], dict):
        raise CheckpointError(f"{path}: fields {sorted(header)}, must be {sorted(fields)}")
    return header


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Lists values by dotted name, as text so that 1, 1.0 and true differ."""
    flat = {}
    for key, value in header.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _check_leaves(leaves: Mapping[str, np.ndarray], cfg: UNETRConfig, what: str) -> None:
    """Raises if names, shapes, dtypes or values do not fit the model."""
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
