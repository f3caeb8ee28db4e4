"""What the options of `unetr predict` make of models: a segmenter and its post-processing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from unetr_flax.commands.models import Model, load_model, read_preprocessing
from unetr_flax.commands.predict_options import FAST_OVERLAP, Computation, Inputs, Outputs
from unetr_flax.commands.regions import tell_regions
from unetr_flax.commands.told import Told
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.presets import PRESETS
from unetr_flax.inference import postprocess, predictor
from unetr_flax.inference.outputs import Extras
from unetr_flax.inference.pipeline import Outcome, segment_cases
from unetr_flax.inference.regions import Regions
from unetr_flax.inference.segment import Segmenter, check_preprocessing, check_regions
from unetr_flax.runtime.compilation_cache import keep_compiled_programs
from unetr_flax.runtime.malloc import keep_freed_memory
from unetr_flax.weights.pretrained import read_metadata


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that the command line says about how cases are segmented; it can be pickled.

    Attributes:
      models: paths of the models, whose probabilities are averaged.
      told: facts about the model in a PyTorch file.
      preprocessing: what is done to a scan before the models.
      regions: what the models predict if not classes.
      inputs: how scans are read.
      computation: how the models are applied.
      outputs: what is written, and how label maps are changed before.
    """

    models: Sequence[Path]
    told: Told
    preprocessing: Preprocessing
    regions: Regions | None
    inputs: Inputs
    computation: Computation
    outputs: Outputs

    @property
    def names(self) -> dict[int, str]:
        """The name of each class id of the label maps, as far as they are known."""
        return self.regions.classes if self.regions else dict(enumerate(self.preprocessing.labels))

    def absolute(self) -> Self:
        """Returns the same with paths that do not depend on the folder of a process."""
        return dataclasses.replace(self, models=[path.absolute() for path in self.models])

    def build(self) -> Callable[..., Iterator[Outcome]]:
        """Loads the models and starts to compile.

        Returns:
          `segment_cases`, which now takes only the cases and a progress callback.

        Raises:
          ValueError: if a model cannot be read, or an option does not fit it.
        """
        # On CPU a tenth of the time would go into making pages of memory anew.
        keep_freed_memory()
        segmenter = self._segmenter()
        outputs = self.outputs
        return functools.partial(
            segment_cases,
            segmenter,
            extras=Extras(outputs.probabilities, outputs.statistics, outputs.preview, outputs.html),
            postprocess=_postprocess(outputs, segmenter),
            allow_nan=self.inputs.allow_nan,
        )

    def _segmenter(self) -> Segmenter:
        keep_compiled_programs()
        devices = _devices(self.computation.device)
        fast = self.computation.fast
        paths = self.models[:1] if fast else self.models
        flips = () if fast else self.computation.flips
        models = [load_model(path, self.told) for path in paths]
        for path, model in zip(paths, models, strict=True):
            if self.inputs.preprocessing is None:
                check_preprocessing(path, model.preprocessing, self.preprocessing)
            _check_flips(path, model, flips)
            provenance = tell_regions(path, model.provenance, self.computation.regions)
            check_regions(path, Regions.from_provenance(path, provenance), self.regions)
        windows_to_logits = predictor.Predictor(
            [predictor.Weights(model.cfg, model.variables) for model in models],
            flips=flips,
            dtype=jnp.dtype(self.computation.dtype),
            devices=devices,
            sigmoid=self.regions is not None,
        )
        overlap = FAST_OVERLAP if fast else self.computation.overlap
        return Segmenter(
            windows_to_logits, self.preprocessing, overlap=overlap, regions=self.regions
        )


def find_preprocessing_of(model: Path, option: str | None) -> Preprocessing:
    """Finds what is done to scans before a model, without reading its weights.

    Args:
      model: a model folder or a PyTorch file.
      option: the value of --preprocessing, which goes before what the folder tells.

    Raises:
      ValueError: if neither tells.
    """
    if option is not None:
        return read_preprocessing(option)
    if not model.exists():
        raise ValueError(f"{model}: no such file or folder")
    own = read_metadata(model)["preprocessing"] if model.is_dir() else None
    if own is None:
        raise ValueError(
            f"{model}: tells no preprocessing; give --preprocessing, one of {', '.join(PRESETS)} "
            "or a JSON file"
        )
    return own


def find_regions_of(model: Path, option: Sequence[str] | None) -> Regions | None:
    """Finds the regions that a model predicts, without reading its weights; None for classes.

    Args:
      model: a model folder or a PyTorch file.
      option: the value of --regions.

    Raises:
      CheckpointError: if the folder tells them in another form.
      ValueError: if the option has another form, or the folder tells regions itself.
    """
    own = read_metadata(model)["provenance"] if model.is_dir() else None
    return Regions.from_provenance(model, tell_regions(model, own, option))


def _devices(name: str | None) -> list[Any] | None:
    """Finds the devices of a platform, or one of them."""
    if name is None:
        return None
    platform, _, index = name.partition(":")
    try:
        devices = jax.local_devices(backend=platform)
        return [devices[int(index)]] if index else devices
    except (RuntimeError, ValueError, IndexError):
        there = ", ".join(f"{d.platform}:{d.id}" for d in jax.local_devices())
        raise ValueError(f"--device {name}: must be a device that is there: {there}") from None


def _check_flips(path: Path, model: Model, flips: Sequence[int]) -> None:
    """Raises if windows would be flipped along axes along which training never flipped."""
    trained = model.provenance.get("flips") if isinstance(model.provenance, dict) else None
    if isinstance(trained, list) and not set(flips) <= set(trained):
        given = " ".join(map(str, flips))
        allowed = ", ".join(map(str, trained)) or "none"
        raise ValueError(f"--flips {given}: {path} was trained with flips along {allowed}")


def _postprocess(outputs: Outputs, segmenter: Segmenter) -> Callable[[np.ndarray], None]:
    """Builds what changes labels in place, in the order subset, largest parts, holes.

    Masks of overlapping regions are changed one by one, each as a label map of its own.
    """
    names, regions = segmenter.names, segmenter.regions
    classes = sorted(set(names) - {0}) or list(range(1, segmenter.num_classes))

    def ids(option: str, values: Sequence[str] | None) -> list[int] | None:
        if values is None:
            return None
        return [_label(option, value, names, classes) for value in values]

    subset = ids("--roi-subset", outputs.roi_subset)
    largest = ids("--keep-largest", outputs.keep_largest)

    def change(labels: np.ndarray, number_of: Callable[[int], int] = int) -> None:
        if subset is not None:
            postprocess.keep_only(labels, map(number_of, subset))
        if largest is not None:
            postprocess.keep_largest(labels, map(number_of, largest or classes))
        if outputs.fill_holes:
            postprocess.fill_holes(labels, map(number_of, classes))

    def change_masks(masks: np.ndarray) -> None:
        for region in range(masks.shape[-1]):
            # In its own mask a region is 1, and of others there is nothing.
            change(masks[..., region], lambda label, own=region + 1: int(label == own))

    return change if regions is None or regions.painted else change_masks


def _label(option: str, value: str, names: Mapping[int, str], classes: Sequence[int]) -> int:
    """Reads the name or id of a label."""
    for label in classes:
        if value == names.get(label):
            return label
    if value.isascii() and value.isdigit() and int(value) in classes:
        return int(value)
    if list(classes) == list(range(classes[0], classes[-1] + 1)):
        allowed = f"{classes[0]} to {classes[-1]}"
    else:
        allowed = ", ".join(map(str, classes))
    if names:
        allowed = f"{', '.join(names[i] for i in classes)}, or an id from {allowed}"
    raise ValueError(f"{option} {value}: must be a label of the model: {allowed}")
