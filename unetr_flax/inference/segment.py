"""A scan to its segmentation: preprocessing, windows, and the way back to the scan's own grid."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from unetr_flax.imaging.file_grid import FileGrid
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.imaging.restore import Restorer
from unetr_flax.imaging.restore_regions import RegionRestorer
from unetr_flax.imaging.scan import Scan, read_scan
from unetr_flax.imaging.volume import Volume, count_not_finite
from unetr_flax.inference.predictor import Predictor, Weights
from unetr_flax.inference.regions import Regions
from unetr_flax.inference.segmentation import Segmentation
from unetr_flax.inference.streaming import stream_logits
from unetr_flax.ops.platform import Lowering
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.pretrained import load_pretrained, read_metadata


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A scan, and what the model sees of it.

    Attributes:
      volume: the scan; None if it is not needed any more.
      file_grid: the grid of its file; None if it came as an array.
      image: [X', Y', Z', C], float32, normalized, on the model's grid.
      grid: the model's grid.
    """

    volume: Volume | None
    file_grid: FileGrid | None
    image: np.ndarray
    grid: ModelGrid


class Segmenter:
    """Segments scans with one model or several, each scan on its own grid.

    The programs are compiled once, for windows; scans of all sizes use them.

    Args:
      predictor: windows to logits.
      preprocessing: what is done to a scan before the model.
      overlap: fraction of the window that neighbors share, in [0, 1).
      regions: what the models predict if not classes, in place of the labels of the preprocessing;
        the predictor must average sigmoids.

    Attributes:
      preprocessing: what is done to a scan before the model.
      overlap: fraction of the window that neighbors share.
      num_classes: number of classes K, or of regions.
      regions: what the models predict if not classes.
      names: name of each class id of the label maps; empty if unknown.

    Raises:
      ValueError: if the preprocessing has another number of channels or classes than the models; if
        the regions are others than they have outputs; if there is one output, and no region.
    """

    def __init__(
        self,
        predictor: Predictor,
        preprocessing: Preprocessing,
        *,
        overlap: float = 0.5,
        regions: Regions | None = None,
    ):
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap={overlap!r}: must be in [0, 1)")
        channels = len(preprocessing.modalities)
        if channels != predictor.in_channels or len(predictor.roi) != 3:
            raise ValueError(
                f"preprocessing: {channels} modalities of 3D scans, the model takes "
                f"{predictor.in_channels} channels of {len(predictor.roi)} axes"
            )
        labels = preprocessing.labels
        if regions:
            regions.check_outputs(predictor.num_classes)
        elif predictor.num_classes == 1:
            raise ValueError(
                "regions: none, but the model has one output, which can only be the sigmoid of a "
                "region; --regions NAME of unetr predict and unetr convert tells its name"
            )
        elif labels and len(labels) != predictor.num_classes:
            raise ValueError(
                f"preprocessing: {len(labels)} labels, the model has {predictor.num_classes}"
            )
        self.preprocessing, self.overlap, self.regions = preprocessing, overlap, regions
        self.names = regions.classes if regions else dict(enumerate(labels))
        self.num_classes = predictor.num_classes
        self._predictor = predictor

    @classmethod
    def from_pretrained(
        cls,
        folders: Path | str | Sequence[Path | str],
        *,
        preprocessing: Preprocessing | None = None,
        overlap: float = 0.5,
        flips: Iterable[int] = (),
        dtype: Any = jnp.float32,
        devices: Sequence[Any] | None = None,
        lowering: Lowering = "auto",
    ) -> Self:
        """Loads one model folder, or several whose probabilities are averaged.

        Args:
          folders: folders of `save_pretrained`.
          preprocessing: in place of the folders' own, which must agree.
          overlap: fraction of the window that neighbors share, in [0, 1).
          flips: axes X, Y, Z as 0, 1, 2 along which windows are flipped; all combinations are
            averaged. Only those that training used help.
          dtype: dtype of the computation.
          devices: devices that share the windows; all of this process if None.
          lowering: see `UNETR`.

        Raises:
          CheckpointError: if a folder cannot be read, has no preprocessing, or another than the
            first; if a model predicts other regions than the first.
          ValueError: if the models do not fit together.
        """
        paths = [Path(folders)] if isinstance(folders, Path | str) else [Path(f) for f in folders]
        models, known = [], preprocessing
        regions = None
        for i, path in enumerate(paths):
            cfg, variables = load_pretrained(path)
            models.append(Weights(cfg, variables))
            metadata = read_metadata(path)
            own = metadata["preprocessing"]
            own_regions = Regions.from_provenance(path, metadata["provenance"])
            regions = own_regions if i == 0 else regions
            check_regions(path, own_regions, regions)
            if preprocessing is None:
                known = check_preprocessing(path, own, known)
        assert known is not None
        predictor = Predictor(
            models,
            flips=flips,
            dtype=dtype,
            devices=devices,
            lowering=lowering,
            sigmoid=regions is not None,
        )
        return cls(predictor, known, overlap=overlap, regions=regions)

    def segment(
        self,
        source: Volume | Scan | Path | str | Sequence[Path | str],
        *,
        allow_nan: bool = False,
        probabilities: bool | np.ndarray = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Segments a scan.

        Args:
          source: a file, a file per channel or the folder of a DICOM series, as for `read_scan`;
            or a scan in memory.
          allow_nan: whether voxels of files that are NaN become the lowest intensity.
          probabilities: whether to return the probabilities of all classes too; or an array
            [X, Y, Z, K] of floating numbers, in memory or on disk, to fill with them, whatever it
            holds.
          progress: called with the number of windows done and of all after each batch.

        Raises:
          VolumeError: if a file cannot be read.
          ValueError: if the scan has another number of channels than the model; if voxels of one in
            memory are NaN or infinite.
        """
        if isinstance(source, Volume):
            prepared = self.prepare(source, None)
        else:
            if not isinstance(source, Scan):
                source = read_scan(source, allow_nan=allow_nan)
            prepared = self.prepare(source.volume, source.grid)
        return self.segment_prepared(prepared, probabilities=probabilities, progress=progress)

    def prepare(self, volume: Volume, file_grid: FileGrid | None) -> Prepared:
        """Brings a scan to the model's grid; needs no device.

        Args:
          volume: the scan.
          file_grid: the grid of the file that `read_scan` read it from; None if it came as an
            array, whose voxels are checked here.

        Raises:
          ValueError: if the scan has another number of channels than the model, or came as an array
            with voxels that are NaN or infinite.
        """
        if file_grid is None and (count := count_not_finite(volume.array)):
            raise ValueError(f"volume: {count} voxels are NaN or infinite, all must be finite")
        image, grid = self.preprocessing.apply(volume)
        return Prepared(volume, file_grid, image, grid)

    def segment_prepared(
        self,
        prepared: Prepared,
        *,
        probabilities: bool | np.ndarray = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Segments a scan that was prepared, see `segment`."""
        grid, classes = prepared.grid, self.num_classes
        soft = probabilities if isinstance(probabilities, np.ndarray) else None
        if probabilities is True:
            soft = np.empty((*grid.scan_shape, classes), np.float32)
        restorer = (RegionRestorer if self.regions else Restorer)(grid, classes, soft)
        blocks = stream_logits(
            prepared.image,
            self._predictor,
            classes,
            self._predictor.roi,
            overlap=self.overlap,
            batch_size=self._predictor.batch_size,
            device=self._predictor.device,
            progress=progress,
        )
        for start, logits in blocks:
            restorer.add(start, logits)
        labels = self.regions.decode(restorer.labels) if self.regions else restorer.labels
        return Segmentation(labels, self.names, prepared.volume, prepared.file_grid, soft)


def check_regions(path: Path, own: Regions | None, first: Regions | None) -> None:
    """Raises CheckpointError unless a model predicts the same regions as the first one."""
    if own != first:
        raise CheckpointError(
            f"{path}: predicts {_outputs(own)}, the first model {_outputs(first)}; models that are "
            "averaged must predict the same"
        )


def _outputs(regions: Regions | None) -> str:
    return "classes" if regions is None else f"the regions {', '.join(regions.names)}"


def check_preprocessing(
    path: Path, own: Preprocessing | None, first: Preprocessing | None
) -> Preprocessing:
    """Returns the preprocessing of a model, which must be that of the models before it.

    Raises:
      CheckpointError: if there is none, or it differs.
    """
    if own is None:
        raise CheckpointError(f"{path}: holds no preprocessing; give one, such as that of 'btcv'")
    if first is not None and own != first:
        different = [
            field.name
            for field in dataclasses.fields(own)
            if getattr(own, field.name) != getattr(first, field.name)
        ]
        raise CheckpointError(
            f"{path}: its preprocessing differs from that of the first model in "
            f"{', '.join(different)}; models that are averaged must have the same"
        )
    return own
