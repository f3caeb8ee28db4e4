"""An endless, repeatable stream of batches, prepared in the background."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from train.data.preprocess import Sample
from train.data.transforms import Augmentation, random_crop

PREFETCHED = 4


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches of random crops: {"image": [B, *roi_size, C] float32, "label": [B, *roi_size] int32}.

    Every epoch visits each case once, in a new order. Batch number n is determined by `seed` and n
    alone, so a restored stream goes on exactly as the original would have.

    Args:
      samples: preprocessed cases. They stay in memory: 4 bytes per voxel for each channel and for
        the label, and 8 more per voxel of the foreground.
      roi_size: voxels of a crop per axis.
      batch_size: crops of the global batch.
      seed: of order, crops and augmentation.
      augmentation: what is varied, or None.
      foreground_fraction: probability that a crop is centered on a foreground voxel.
      part: this process's share of every batch, as (which, of how many).

    What goes wrong in the background is raised by `next`, at the batch that it concerns.

    Raises:
      ValueError: if the batch cannot be shared evenly, or there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        roi_size: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        augmentation: Augmentation | None,
        foreground_fraction: float = 0.5,
        part: tuple[int, int] = (0, 1),
    ):
        if not samples:
            raise ValueError("samples: must have at least one case")
        if batch_size < 1 or batch_size % part[1]:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of {part[1]} processes")
        self._samples = samples
        self._roi_size = tuple(roi_size)
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation
        self._foreground_fraction = foreground_fraction
        self._part = part
        self._step = 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="batches")
        self._pending: collections.deque[Future] = collections.deque()

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._pending) < PREFETCHED:
            step = self._step + len(self._pending)
            self._pending.append(self._pool.submit(self._batch, step))
        # Taken off only when it is there, so that an error does not shift what follows.
        batch = self._pending[0].result()
        self._pending.popleft()
        self._step += 1
        return batch

    def state(self) -> dict[str, int]:
        """Where the stream is: what `restore` takes."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to where another stream with the same arguments was."""
        self._drop_pending()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the threads; the stream cannot be used after."""
        self._drop_pending()
        self._pool.shutdown()

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        which, of = self._part
        share = self._batch_size // of
        first = step * self._batch_size + which * share
        crops = [self._crop(number) for number in range(first, first + share)]
        images, labels = zip(*crops, strict=True)
        return {"image": np.stack(images), "label": np.stack(labels)}

    def _crop(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Crop number `number` of the whole stream."""
        epoch, position = divmod(number, len(self._samples))
        # Two independent generators: the order of an epoch, and what is random about one crop.
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._samples))
        rng = np.random.default_rng((self._seed, 1, number))
        return random_crop(
            self._samples[order[position]],
            self._roi_size,
            self._foreground_fraction,
            self._augmentation,
            rng,
        )


def auto_roi(
    shapes: Iterable[Sequence[int]], patch_size: Sequence[int], largest: int = 96
) -> tuple[int, ...]:
    """A crop that holds a typical case: the median size, in whole patches, at most `largest`.

    Args:
      shapes: voxels of each case per axis.
      patch_size: voxels of a patch per axis.
      largest: voxels that no axis exceeds.
    """
    median = np.median(np.array(list(shapes)), axis=0)
    return tuple(
        int(max(patch, min(-(-size // patch) * patch, largest // patch * patch)))
        for size, patch in zip(median, patch_size, strict=True)
    )
