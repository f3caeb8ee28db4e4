"""What the options of `unetr predict` make of models: a segmenter and its post-processing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from unetr_flax.commands.models import Model, load_model, read_preprocessing
from unetr_flax.commands.predict_options import FAST_OVERLAP, Computation, Inputs, Outputs
from unetr_flax.commands.told import Told
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.presets import PRESETS
from unetr_flax.inference import postprocess, predictor
from unetr_flax.inference.outputs import Extras
from unetr_flax.inference.pipeline import Outcome, segment_cases
from unetr_flax.inference.segment import Segmenter, check_preprocessing, refuse_regions
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
      inputs: how scans are read.
      computation: how the models are applied.
      outputs: what is written, and how label maps are changed before.
    """

    models: Sequence[Path]
    told: Told
    preprocessing: Preprocessing
    inputs: Inputs
    computation: Computation
    outputs: Outputs

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
            postprocess=_postprocess(outputs, self.preprocessing.labels, segmenter.num_classes),
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
            refuse_regions(path, model.provenance)
        windows_to_logits = predictor.Predictor(
            [predictor.Weights(model.cfg, model.variables) for model in models],
            flips=flips,
            dtype=jnp.dtype(self.computation.dtype),
            devices=devices,
        )
        overlap = FAST_OVERLAP if fast else self.computation.overlap
        return Segmenter(windows_to_logits, self.preprocessing, overlap=overlap)


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


def _postprocess(
    outputs: Outputs, names: Sequence[str], num_classes: int
) -> Callable[[np.ndarray], None]:
    """Builds what changes label maps in place, in the order subset, largest parts, holes."""
    classes = range(1, num_classes)

    def ids(option: str, values: Sequence[str] | None) -> list[int] | None:
        if values is None:
            return None
        return [_label(option, value, names, classes) for value in values]

    subset = ids("--roi-subset", outputs.roi_subset)
    largest = ids("--keep-largest", outputs.keep_largest)

    def change(labels: np.ndarray) -> None:
        if subset is not None:
            postprocess.keep_only(labels, subset)
        if largest is not None:
            postprocess.keep_largest(labels, largest or classes)
        if outputs.fill_holes:
            postprocess.fill_holes(labels, classes)

    return change


def _label(option: str, value: str, names: Sequence[str], classes: range) -> int:
    """Reads the name or id of a label."""
    if value in names[1:]:
        return names.index(value, 1)
    if value.isascii() and value.isdigit() and int(value) in classes:
        return int(value)
    allowed = f"{classes[0]} to {classes[-1]}" if classes else "none, the model has one class"
    if names:
        allowed = f"{', '.join(names[1:])}, or an id from {allowed}"
    raise ValueError(f"{option} {value}: must be a label of the model: {allowed}")
