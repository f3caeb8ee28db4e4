"""How large a data set is, from the headers of its files alone."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from train.data.dataset import BadCasesError, Case, Dataset
from train.data.stored_files import stored_files
from unetr_flax.imaging.preprocessing import MOST_VOXELS, Preprocessing
from unetr_flax.imaging.resampling import resampled_shape
from unetr_flax.imaging.scan import open_image_file
from unetr_flax.imaging.volume import VolumeError

_READERS = 4
# A voxel of a prepared case: 4 bytes per channel, 1 for the target, and 4 where it is foreground.
_TARGET_BYTES = 1


@dataclasses.dataclass(frozen=True)
class Need:
    """What a data set needs.

    Attributes:
      file_bytes: bytes of its files.
      prepared_bytes: bytes of its prepared cases, without the indices of the foreground.
      preparing_bytes: memory that preparing the largest case takes.
      largest_shape: the largest number of voxels of the prepared cases along each axis.
    """

    file_bytes: int
    prepared_bytes: int
    preparing_bytes: int
    largest_shape: tuple[int, ...]


def measure(dataset: Dataset, preprocessing: Preprocessing) -> Need:
    """Reads the headers of all images.

    Raises:
      BadCasesError: naming headers that nothing can be made of, one line each.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = list(pool.map(lambda case: _measure_case(case, preprocessing), dataset.cases))
    if problems := [size for size in sizes if isinstance(size, str)]:
        raise BadCasesError("\n".join(problems))
    known = [size for size in sizes if isinstance(size, Need)]
    return Need(
        file_bytes=sum(size.file_bytes for size in known),
        prepared_bytes=sum(size.prepared_bytes for size in known),
        preparing_bytes=max((size.preparing_bytes for size in known), default=0),
        largest_shape=_largest([size.largest_shape for size in known]),
    )


def _measure_case(case: Case, preprocessing: Preprocessing) -> Need | str | None:
    """Measures a case; None if reading it will say what is wrong, a line if it must not be read."""
    image = case.images[0]
    try:
        file = open_image_file(image)
        files = [stored for path in case.files for stored in stored_files(path)]
        file_bytes = sum(os.stat(stored).st_size for stored in files)
    except (VolumeError, OSError):
        return None
    shape = file.grid.canonical_shape
    spacing = np.linalg.norm(file.grid.canonical_affine[:3, :3], axis=0).tolist()
    target = preprocessing.spacing
    prepared = shape if target is None else resampled_shape(shape, spacing, target)
    if math.prod(prepared) > MOST_VOXELS:
        return (
            f"{image}: {_times(shape)} voxels of {_times(f'{mm:.4g}' for mm in spacing)} mm would "
            f"become {_times(prepared)}, more than {MOST_VOXELS:,}; --spacing must be larger"
        )
    channels = len(preprocessing.modalities)
    voxels, prepared_voxels = math.prod(shape), math.prod(prepared)
    return Need(
        file_bytes,
        prepared_voxels * (4 * channels + _TARGET_BYTES),
        # The image as stored, read and normalized, its label map, and both resampled.
        voxels * (12 * channels + 8) + prepared_voxels * (8 * channels + 8),
        prepared,
    )


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(axis) for axis in zip(*shapes, strict=True))


def _times(numbers: Iterable) -> str:
    return " x ".join(map(str, numbers))
