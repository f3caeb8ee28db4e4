"""Weights that a run starts from, in place of random ones: a model folder's, or an encoder's."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from train.config import Config
from train.run_dir import OptionError
from train.state import TrainState
from unetr_flax import UNETRConfig
from unetr_flax.commands.encoders import read_encoder
from unetr_flax.weights import CheckpointError, load_pretrained, resize_position_embedding

# Arrays whose shapes depend on the data: classes and channels.
HEAD, STEM = ("decoder", "head"), ("encoder", "embedding", "projection")
# Fields of the model in which a folder may differ; others change what the same arrays compute.
MAY_DIFFER = {"img_size", "in_channels", "out_channels", "proj_type", "dropout_rate"}


def check_initial(cfg: Config) -> None:
    """Checks the options that name weights; a run that goes on has its own by now.

    Raises:
      OptionError: if both are given, or a path is not there.
    """
    if cfg.run.resume == "yes":
        return
    training = cfg.training
    if training.init is not None and training.init_encoder is not None:
        raise OptionError("--init and --init-encoder: only one of them can be given")
    for option, path in (("--init", training.init), ("--init-encoder", training.init_encoder)):
        if path is not None and not path.exists():
            raise OptionError(f"{option} {path}: no such file or folder")


def with_initial_weights(
    state: TrainState, cfg: Config, model_config: UNETRConfig
) -> tuple[TrainState, str]:
    """Replaces the random weights of a new state by those that --init or --init-encoder names.

    Args:
      state: the state before the first step.
      cfg: the options of the run.
      model_config: the model.

    Returns:
      The state, on the devices where it was, and what was loaded, in words; "" if nothing is named.

    Raises:
      OptionError: if the weights cannot be read or do not fit the model.
    """
    training = cfg.training
    if training.init is None and training.init_encoder is None:
        return state, ""
    shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.variables)
    try:
        if training.init_encoder is not None:
            loaded, transfer = read_encoder(training.init_encoder, model_config, shapes, None)
            told = transfer.describe()
            given = {
                ("params", "encoder", *path): leaf
                for path, leaf in traverse_util.flatten_dict(loaded["params"]["encoder"]).items()
            }
        else:
            assert training.init is not None
            given, told = _of_folder(training.init, model_config, shapes)
    except (ValueError, OSError) as error:
        option = "--init" if training.init_encoder is None else "--init-encoder"
        # The window is an option of another command, whose result --init takes.
        message = str(error).replace(
            "--encoder-img-size: must", "unetr convert --encoder-for --encoder-img-size: must"
        )
        raise OptionError(f"{option} {message}") from None
    variables: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(
        state.variables, keep_empty_nodes=True
    )
    for path, leaf in given.items():
        old = variables[path]
        variables[path] = jax.device_put(np.asarray(leaf, old.dtype), old.sharding)
    new = traverse_util.unflatten_dict(variables)
    state = state.replace(params=new["params"], batch_stats=new.get("batch_stats", {}))
    if state.average is not None:
        # Copies, since a step donates each buffer of the state.
        state = state.replace(average=jax.tree.map(jnp.copy, state.variables))
    return state, told


def _of_folder(
    folder: Path, cfg: UNETRConfig, shapes: dict[str, Any]
) -> tuple[dict[tuple[str, ...], Any], str]:
    """Reads a model folder's arrays; those that depend on classes or channels may not fit."""
    their_cfg, variables = load_pretrained(folder)
    resized = ""
    if their_cfg.grid_size != cfg.grid_size and their_cfg.patch_size == cfg.patch_size:
        _, variables = resize_position_embedding(their_cfg, variables, cfg.img_size)
        resized = ", positions interpolated"
    theirs: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
    ours: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(shapes)
    fits = {p for p, leaf in ours.items() if p in theirs and theirs[p].shape == leaf.shape}
    left = sorted("/".join(path[1:]) for path in ours.keys() - fits)
    for path in sorted(ours.keys() - fits):
        by_channels = path[1:3] == HEAD or path[1:4] == STEM or _reads_image(path, cfg)
        if path not in theirs or not by_channels:
            found = np.shape(theirs[path]) if path in theirs else "missing"
            raise CheckpointError(
                f"{folder}: {'/'.join(path)} is {found}, in this model {ours[path].shape}; only "
                "channels, classes and the window may differ"
            )
    _check_computes_alike(folder, their_cfg, cfg)
    if left:
        resized += f"; not loaded, since classes or channels differ: {', '.join(left)}"
    return {path: theirs[path] for path in fits}, (
        f"{len(fits)} of {len(ours)} arrays from {folder}{resized}"
    )


def _check_computes_alike(folder: Path, theirs: UNETRConfig, ours: UNETRConfig) -> None:
    """Raises CheckpointError if a model would compute something else, though its arrays fit."""
    found, needed = vars(theirs), vars(ours)
    for field in found:
        if field not in MAY_DIFFER and found[field] != needed[field]:
            raise CheckpointError(
                f"{folder}: {field}={found[field]}, in this model {needed[field]}; only channels, "
                "classes and the window may differ"
            )


def _reads_image(path: tuple[str, ...], cfg: UNETRConfig) -> bool:
    """Returns whether an array belongs to the first block of the skip at full resolution."""
    last = len(cfg.decoder_stages) - 1
    return path[1:4] == ("decoder", f"stage_{last}", "skip_0")
