"""python -m train.export RUN FOLDER: saves the best model of a run as a folder that `unetr` takes.

A run that reaches its end does so by itself; this is for runs that are stopped before or going on.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from train import sharding
from train.checkpoint import CheckpointError, Checkpoints
from train.data.preprocess import make_preprocessing
from train.run_dir import checkpoints_folder, run_file
from unetr_flax import UNETR, Preprocessing, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import save_pretrained


class ExportError(ValueError):
    """A run without a model to export; the message is one line."""


def save_model(
    folder: Path, variables: dict[str, Any], record: dict[str, Any], step: int | None
) -> None:
    """Saves a model of a run with its preprocessing and provenance.

    Args:
      folder: where to save; an older model there is replaced.
      variables: "params" and "batch_stats".
      record: the content of the run's `run.json`.
      step: number of training steps of the model.
    """
    dataset = record["dataset"]
    save_pretrained(
        folder,
        UNETRConfig.from_dict(record["model"]),
        variables,
        preprocessing=run_preprocessing(record),
        provenance={
            "dataset": dataset["name"],
            "fingerprint": dataset["fingerprint"],
            "step": step,
            # Outputs of overlapping regions have no softmax and no background.
            **(_regions(dataset) if _has_regions(record) else {}),
            # Axes along which prediction may flip.
            "flips": _flips(record["options"]),
        },
    )


def _regions(dataset: dict[str, Any]) -> dict[str, Any]:
    """Returns the names of the regions, and what turns them back into classes as far as known."""
    known = {key: dataset[key] for key in ("region_ids", "regions_class_order") if key in dataset}
    return {"regions": dataset["labels"][1:], **known}


def _flips(options: dict[str, Any]) -> list[int]:
    """Returns the axes along which training has flipped; older versions never did."""
    return sorted(options.get("flips", [])) if options.get("flip_probability") else []


def run_preprocessing(record: dict[str, Any]) -> Preprocessing:
    """Builds the preprocessing of a run from the content of its `run.json`."""
    dataset, options = record["dataset"], record["options"]
    # Runs of older versions have no window and crop nothing.
    return make_preprocessing(
        dataset["modalities"],
        () if _has_regions(record) else dataset["labels"],
        spacing=options["spacing"],
        window=options.get("window"),
        crop_foreground=options.get("crop_foreground", False),
    )


def _has_regions(record: dict[str, Any]) -> bool:
    """Returns whether the model of a run has outputs for regions, without the background."""
    return record["model"]["out_channels"] < len(record["dataset"]["labels"])


def export(run: Path, folder: Path) -> int:
    """Saves the best model that a run has so far.

    Args:
      run: the run's folder; it is left as it is, so the run may be going on.
      folder: where to save the model; an older model there is replaced.

    Returns:
      The step of the model.

    Raises:
      ExportError: if there is no run, or it has not validated yet.
      train.checkpoint.CheckpointError: if its best checkpoint cannot be read.
    """
    path = run_file(run)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        cfg = UNETRConfig.from_dict(record["model"])
        run_preprocessing(record)
    except FileNotFoundError:
        raise ExportError(f"{run}: holds no run, it has no {path.name}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: {error}") from None
    checkpoints = Checkpoints(checkpoints_folder(run), read_only=True)
    try:
        step = checkpoints.best_step
        if step is None:
            raise ExportError(f"{run}: has not validated yet, so it has no best model")
        replicated = sharding.replicated(sharding.make_mesh())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
            abstract_variables(UNETR(cfg)),
        )
        variables = checkpoints.restore_best(abstract)
    finally:
        checkpoints.close()
    save_model(folder, variables, record, step)
    return step


def main(args: list[str]) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0, or 2 after one line that says what is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, its --out")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the model goes")
    options = parser.parse_args(args)
    try:
        step = export(options.run, options.folder)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"train.export: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: the model of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
