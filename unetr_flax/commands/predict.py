"""`unetr predict`: scans to label maps on their own grids."""

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unetr_flax.commands.predict_console import Console
from unetr_flax.commands.predict_options import Computation, Inputs, Outputs
from unetr_flax.commands.told import Told
from unetr_flax.commands.verdict import Verdict

if TYPE_CHECKING:
    from unetr_flax.commands.predict_setup import Setup
    from unetr_flax.inference.pipeline import Case, Outcome


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
    --preprocessing, and with --regions if its outputs are sigmoids. INPUT is a scan (NIfTI, NRRD,
    MetaImage, or a DICOM series with SimpleITK), or a folder of scans with all below it. OUTPUT is
    a file that ends in .nii.gz or .nii, or a folder, which gets a label map for each case, and
    labels.json with the names of the labels. What is there is skipped, so a run that was stopped
    goes on with the same command. Overlapping regions become a label map where they are nested,
    else 4D masks; the output says which.

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
        raise ValueError(
            f"{len(paths)} paths are left after the options, must be MODEL, INPUT and OUTPUT; "
            "a list of values ends at the next option, or at --"
        )
    from unetr_flax.commands.predict_setup import Setup, find_preprocessing_of, find_regions_of
    from unetr_flax.inference.outputs import write_names

    *models, source, target = paths
    console = Console(outputs)
    preprocessing = find_preprocessing_of(models[0], inputs.preprocessing)
    regions = find_regions_of(models[0], computation.regions)
    setup = Setup(models, told, preprocessing, regions, inputs, computation, outputs)
    cases = _find_cases(source, target, len(preprocessing.modalities), inputs.part, console)
    todo: list[Case] = []
    skipped: list[Case] = []
    for case in cases:
        there = not outputs.overwrite and case.outputs.labels.exists()
        (skipped if there else todo).append(case)
    if skipped:
        console.say(
            f"{len(skipped)} of {len(cases)} label maps are there; --overwrite replaces them"
        )
        # A run that was killed may have left the last label map without them.
        if not skipped[0].outputs.names.exists():
            write_names(skipped[0].outputs.names, setup.names)
    outcomes: list[Outcome] = []
    if todo:
        if regions:
            console.say(regions.describe())
        outcomes = _segment(setup, todo, console)
    console.summarize(outcomes, skipped, masks=regions is not None and not regions.painted)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    if failed:
        raise Verdict(f"{failed} of {len(todo)} cases failed")


def _find_cases(
    source: Path, target: Path, channels: int, given_part: str | None, console: Console
) -> "list[Case]":
    """Finds the cases of this process, and where their label maps go."""
    from unetr_flax.commands.parts import find_part, take_part
    from unetr_flax.imaging.case_files import find_cases
    from unetr_flax.imaging.file_grid import NIFTI_ENDINGS
    from unetr_flax.imaging.scan import SCAN_ENDINGS
    from unetr_flax.inference.outputs import CaseOutputs
    from unetr_flax.inference.pipeline import Case

    _check_apart(source, target)
    # Results of an earlier run in a folder below the scans are no scans.
    found = find_cases(source, channels, except_below=target)
    if target.name.lower().endswith(NIFTI_ENDINGS) and not target.is_dir():
        if len(found) > 1:
            raise ValueError(f"{target}: must be a folder, {source} has {len(found)} cases")
        return _checked([Case(found[0].name, found[0], CaseOutputs.of_file(target))])
    if not target.is_dir() and (target.exists() or target.name.lower().endswith(SCAN_ENDINGS)):
        raise ValueError(f"{target}: must be a folder, or end in {' or '.join(NIFTI_ENDINGS)}")
    names = target / "labels.json"
    cases = _checked(
        [
            Case(case.name, case, CaseOutputs(target / f"{case.name}.nii.gz", names))
            for case in found
        ]
    )
    # The tasks of an array that have a scan each say so by what they are given, not by a part.
    part = find_part(given_part) if given_part is not None or len(cases) > 1 else None
    if part is None:
        return cases
    number, parts, origin = part
    share = take_part(cases, number, parts)
    console.say(f"part {number} of {parts} ({origin}): {len(share)} of {len(cases)} cases")
    return share


def _check_apart(source: Path, target: Path) -> None:
    """Raises if label maps would lie among the scans of a folder, and be scans of the next run."""
    from unetr_flax.imaging.file_grid import NIFTI_ENDINGS

    if not source.is_dir():
        return
    folder, place = source.resolve(), target.resolve()
    if place == folder:
        raise ValueError(f"{target}: is the folder of the scans, must be another one")
    one_file = target.name.lower().endswith(NIFTI_ENDINGS) and not target.is_dir()
    if one_file and folder in place.parents:
        raise ValueError(f"{target}: is in the folder of the scans, must be elsewhere")


def _checked(cases: "list[Case]") -> "list[Case]":
    """Returns cases; raises if a label map would take the place of a scan."""
    scans = {image.resolve() for case in cases for image in case.files.images}
    for case in cases:
        if case.outputs.labels.resolve() in scans:
            raise ValueError(f"{case.outputs.labels}: is a scan of the input, must be elsewhere")
    return cases


def _segment(setup: "Setup", cases: "list[Case]", console: Console) -> "list[Outcome]":
    """Segments cases in this process or on a Ray cluster, and prints what becomes of each."""
    from unetr_flax.runtime.atomic import check_writable

    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if setup.computation.ray is None:
            segment = functools.partial(setup.build(), progress=console.progress)
        else:
            from unetr_flax.inference.ray_pool import RayPool

            address, device = setup.computation.ray, setup.computation.device
            pool = stack.enter_context(RayPool(address, device, len(cases), console.say))
            pool.start(setup.absolute().build)
            segment = pool.segment
        names = cases[0].outputs.names
        names.parent.mkdir(parents=True, exist_ok=True)
        check_writable(names)
        for outcome in segment(cases):
            outcomes.append(outcome)
            console.outcome(outcome, len(outcomes), len(cases), setup.names)
    return outcomes
