"""`unetr predict`: scans to label maps on their own grids."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unetr_flax.commands.predict_console import Console
from unetr_flax.commands.predict_options import FAST_OVERLAP, Computation, Inputs, Outputs
from unetr_flax.commands.told import Told
from unetr_flax.commands.verdict import Verdict

if TYPE_CHECKING:
    import numpy as np

    from unetr_flax.imaging.preprocessing import Preprocessing
    from unetr_flax.inference.pipeline import Case, Outcome
    from unetr_flax.inference.segment import Segmenter


def predict(
    paths: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="MODEL [MODEL ..] INPUT OUTPUT"),
    ],
    inputs: Inputs,
    computation: Computation,
    outputs: Outputs,
    told: Annotated[Told, tyro.conf.arg(name="model")],
) -> None:
    """Segment scans: label maps on exactly the grid of each scan.

    MODEL is a model folder, or several, whose probabilities are averaged, or a PyTorch file with
    --preprocessing. INPUT is a scan (NIfTI; NRRD, MetaImage and DICOM with SimpleITK), or a folder
    of scans with all below it. OUTPUT is a file that ends in .nii.gz or .nii, or a folder, which
    gets a label map for each case, and labels.json with the names of the labels. What is there is
    skipped, so a run that was stopped goes on with the same command.

    Exit status: 0 if all cases are done, 1 if some could not be segmented (each is reported, the
    others are done), 2 if nothing could be started, 130 after Ctrl-C.

    Args:
      paths: Models, input and output.
      inputs: How scans are read.
      computation: How the model is applied.
      outputs: What is written.
      told: Facts about the model in a PyTorch file that its shapes do not tell.
    """
    if len(paths) < 3:
        raise ValueError(f"{len(paths)} paths, must be MODEL, INPUT and OUTPUT")
    *models, source, target = paths
    console = Console(outputs)
    cases = _find(source, target, inputs, models, console)
    todo = [case for case in cases if outputs.overwrite or not case.outputs.labels.exists()]
    skipped = [case for case in cases if case not in todo]
    if skipped:
        console.say(
            f"{len(skipped)} of {len(cases)} label maps are there; --overwrite replaces them"
        )
    outcomes: list[Outcome] = []
    if todo:
        segmenter = _segmenter(models, inputs, computation, told)
        postprocess = _postprocess(outputs, segmenter.preprocessing)
        _write_names(target, todo, segmenter.preprocessing)
        outcomes = _run(segmenter, todo, inputs, outputs, postprocess, console)
    console.summarize(outcomes, skipped)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise Verdict(f"{len(failed)} of {len(todo)} cases failed")


def _find(
    source: Path, target: Path, inputs: Inputs, models: Sequence[Path], console: Console
) -> "list[Case]":
    """Finds the cases of this process, and where their label maps go."""
    from unetr_flax.commands.parts import find_part, take_part
    from unetr_flax.imaging.case_files import find_cases
    from unetr_flax.imaging.file_grid import NIFTI_ENDINGS
    from unetr_flax.inference.outputs import CaseOutputs
    from unetr_flax.inference.pipeline import Case

    found = find_cases(source, _channels(models[0], inputs))
    if target.name.lower().endswith(NIFTI_ENDINGS) and not target.is_dir():
        if len(found) > 1:
            raise ValueError(f"{target}: must be a folder, {source} has {len(found)} cases")
        return [Case(found[0].name, found[0], CaseOutputs(target))]
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: must be a folder, or end in {' or '.join(NIFTI_ENDINGS)}")
    part = find_part(inputs.part)
    if part is not None:
        number, parts, origin = part
        console.say(f"part {number} of {parts} ({origin})")
        found = take_part(found, number, parts)
    return [Case(case.name, case, CaseOutputs(target / f"{case.name}.nii.gz")) for case in found]


def _channels(model: Path, inputs: Inputs) -> int:
    """Tells how many channels a case has, without reading weights."""
    preprocessing = _preprocessing(model, inputs)
    return len(preprocessing.modalities)


def _preprocessing(model: Path, inputs: Inputs) -> "Preprocessing":
    from unetr_flax.imaging.presets import PRESETS, find_preprocessing
    from unetr_flax.weights.pretrained import read_metadata

    if inputs.preprocessing is not None:
        try:
            return find_preprocessing(inputs.preprocessing)
        except ValueError as error:
            raise ValueError(f"--preprocessing {error}") from None
    own = read_metadata(model)["preprocessing"] if model.is_dir() else None
    if own is None:
        if not model.exists():
            raise ValueError(f"{model}: no such file or folder")
        raise ValueError(
            f"{model}: tells no preprocessing; --preprocessing gives it, one of "
            f"{', '.join(PRESETS)} or a JSON file"
        )
    return own


def _segmenter(
    paths: Sequence[Path], inputs: Inputs, computation: Computation, told: Told
) -> "Segmenter":
    import jax.numpy as jnp

    from unetr_flax.commands.models import load_model
    from unetr_flax.inference.predictor import Predictor, Weights
    from unetr_flax.inference.segment import Segmenter, check_preprocessing
    from unetr_flax.runtime.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    devices = _devices(computation.device)
    fast = computation.fast
    models = [load_model(path, told) for path in (paths[:1] if fast else paths)]
    preprocessing = _preprocessing(paths[0], inputs)
    if inputs.preprocessing is None:
        for path, model in zip(paths, models, strict=False):
            check_preprocessing(path, model.preprocessing, preprocessing)
    flips = () if fast else computation.flips
    for path, model in zip(paths, models, strict=False):
        trained = model.provenance.get("flips") if isinstance(model.provenance, dict) else None
        if trained is not None and not set(flips) <= set(trained):
            raise ValueError(f"--flips {flips}: {path} was trained with flips along {trained}")
    predictor = Predictor(
        [Weights(model.cfg, model.variables) for model in models],
        flips=flips,
        dtype=jnp.dtype(computation.dtype),
        devices=devices,
    )
    overlap = FAST_OVERLAP if fast else computation.overlap
    return Segmenter(predictor, preprocessing, overlap=overlap)


def _devices(name: str | None) -> list | None:
    """Finds the devices of a platform, or one of them."""
    if name is None:
        return None
    import jax

    platform, _, index = name.partition(":")
    try:
        devices = jax.local_devices(backend=platform)
        return devices if not index else [devices[int(index)]]
    except (RuntimeError, ValueError, IndexError):
        there = ", ".join(f"{d.platform}:{d.id}" for d in jax.local_devices())
        raise ValueError(f"--device {name}: there is {there}") from None


def _postprocess(
    outputs: Outputs, preprocessing: "Preprocessing"
) -> "Callable[[np.ndarray], None]":
    from unetr_flax.inference import postprocess

    names = preprocessing.labels
    subset, largest = (
        None if given is None else [_label(option, value, names) for value in given]
        for option, given in (
            ("--roi-subset", outputs.roi_subset),
            ("--keep-largest", outputs.keep_largest),
        )
    )

    def change(labels: "np.ndarray") -> None:
        everything = range(1, int(labels.max()) + 1)
        if subset is not None:
            postprocess.keep_only(labels, subset)
        if largest is not None:
            postprocess.keep_largest(labels, largest or everything)
        if outputs.fill_holes:
            postprocess.fill_holes(labels, everything)

    return change


def _label(option: str, value: str, names: Sequence[str]) -> int:
    """Reads a label by its name or id."""
    if value in names:
        return names.index(value)
    allowed = ", ".join(names[1:]) if names else "ids from 1 on, as no names are known"
    if (
        value.isascii()
        and value.isdigit()
        and int(value) >= 1
        and (not names or int(value) < len(names))
    ):
        return int(value)
    raise ValueError(f"{option} {value}: must be a label of the model: {allowed}")


def _write_names(target: Path, cases: "Sequence[Case]", preprocessing: "Preprocessing") -> None:
    """Writes the names of the labels beside the label maps."""
    from unetr_flax.runtime.atomic import write_text

    if not preprocessing.labels:
        return
    names = {name: label for label, name in enumerate(preprocessing.labels)}
    one_file = cases[0].outputs.labels == target
    path = cases[0].outputs.beside("labels.json") if one_file else target / "labels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(names, indent=2) + "\n")


def _run(
    segmenter: "Segmenter",
    cases: "Sequence[Case]",
    inputs: Inputs,
    outputs: Outputs,
    postprocess: "Callable[[np.ndarray], None]",
    console: Console,
) -> "list[Outcome]":
    from unetr_flax.inference.outputs import Extras
    from unetr_flax.inference.pipeline import segment_cases

    extras = Extras(outputs.probabilities, outputs.statistics, outputs.preview, outputs.html)
    outcomes = []
    for outcome in segment_cases(
        segmenter,
        cases,
        extras=extras,
        postprocess=postprocess,
        allow_nan=inputs.allow_nan,
        progress=console.progress,
    ):
        outcomes.append(outcome)
        console.outcome(outcome, len(outcomes), len(cases), segmenter.preprocessing.labels)
    return outcomes
