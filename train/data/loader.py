"""An endless, repeatable stream of batches, prepared in the background."""

import time
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from train.data.crops import Crop
from train.data.preprocess import Sample

# Batches that are made ahead. Threads suffice, as cropping and resampling release Python's lock;
# grain's worker processes take 14 s to start and send every batch through a pipe.
PREFETCHED = 4
_THREADS = 4
_END = 2**62


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterates over batches {"image": [B, *spatial, C] float32, "label": [B, *spatial] int32}.

    Every epoch visits each case once, in a new order. Batch number n is determined by `seed` and n
    alone, so a restored stream goes on exactly as the original would have. An error in the
    background is raised by `next`, at the batch that it concerns.

    Args:
      samples: preprocessed cases, each asked for when it is cropped.
      crop: cuts a crop out of a case; all have one shape.
      batch_size: crops of the global batch.
      seed: seed of the order of cases and of the crops.
      shard: this process's share of every batch, as (which, of how many).

    Attributes:
      waited: seconds that `next` has waited for batches so far.

    Raises:
      ValueError: if the batch cannot be shared evenly, or there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        crop: Crop,
        batch_size: int,
        seed: int,
        *,
        shard: tuple[int, int] = (0, 1),
    ):
        if not samples:
            raise ValueError("samples: must have at least one case")
        if batch_size < 1 or batch_size % shard[1]:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of {shard[1]} processes")
        self._samples = samples
        self._crop = crop
        self._batch_size = batch_size
        self._seed = seed
        self._shard = shard
        self._step = 0
        self._iterator: grain.DatasetIterator | None = None
        self.waited = 0.0

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            batches = grain.MapDataset.range(self._step, _END).map(self._batch)
            options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=PREFETCHED)
            self._iterator = iter(batches.to_iter_dataset(options))
        started = time.monotonic()
        try:
            batch = next(self._iterator)
        except BaseException:
            # The stream stays where it is: an error must not shift later batches.
            self.close()
            raise
        self.waited += time.monotonic() - started
        self._step += 1
        return batch

    def state(self) -> dict[str, int]:
        """Returns the place in the stream, for `restore`."""
        return {"step": self._step}

    def restore(self, state: dict[str, int]) -> None:
        """Goes to the place of another stream that has the same arguments."""
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the threads; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        which, of = self._shard
        share = self._batch_size // of
        first = step * self._batch_size + which * share
        crops = [self._sample(number) for number in range(first, first + share)]
        return {
            "image": np.stack([crop.image for crop in crops]),
            "label": np.stack([crop.label for crop in crops]).astype(np.int32, copy=False),
        }

    def _sample(self, number: int) -> Sample:
        """Cuts out crop number `number` of the whole stream."""
        epoch, place = divmod(number, len(self._samples))
        # Two independent generators: for the order of an epoch, and for the crop.
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._samples))
        rng = np.random.default_rng((self._seed, 1, number))
        return self._crop(self._samples[order[place]], rng)


def auto_roi(
    shapes: Iterable[Sequence[int]], patch_size: Sequence[int], largest: int = 96
) -> tuple[int, ...]:
    """Chooses a crop that holds a typical case: the median size in whole patches.

    Args:
      shapes: voxels of each case per axis.
      patch_size: voxels of a patch per axis.
      largest: upper limit for the voxels of the crop per axis.
    """
    median = np.median(np.array(list(shapes)), axis=0)
    return tuple(
        int(max(patch, min(-(-size // patch) * patch, largest // patch * patch)))
        for size, patch in zip(median, patch_size, strict=True)
    )
