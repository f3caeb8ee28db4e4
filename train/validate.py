"""Validation: whole scans, segmented window by window and judged on their own grids."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from train.data.cases import read_case
from train.data.dataset import Case, Dataset
from train.data.preprocess import Sample
from train.distributed import process_sum
from train.interrupt import Interrupt
from train.sharding import local_copy
from train.state import TrainState
from unetr_flax import Preprocessing
from unetr_flax.evaluation.dice import DiceCounts, DiceScores
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore import Restorer
from unetr_flax.inference.predictor import make_predict, windows_per_device
from unetr_flax.inference.streaming import stream_logits


class Evaluator:
    """Segments cases and computes their Dice.

    Args:
      model: a UNETR; its img_size is the window.
      dataset: the data set of the cases.
      cases: cases to segment.
      preprocessing: preparation of a scan for the model, which is undone for the logits.
      overlap: fraction of the window that neighbors share.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        overlap: float,
    ):
        self._config = model.config
        self._predict = make_predict(model)
        self._dataset = dataset
        self._cases = cases
        self._preprocessing = preprocessing
        self._overlap = overlap

    def __call__(self, state: TrainState, interrupt: Interrupt) -> DiceScores | None:
        """Computes the Dice over all cases, each process doing its share; None if interrupted."""
        num_classes = self._config.out_channels
        mine = range(jax.process_index(), len(self._cases), jax.process_count())
        # Every process fills in the rows of its own cases, so that the sum has all rows.
        rows = np.zeros((3, len(self._cases), num_classes), np.int64)
        stopped = np.zeros((), np.int64)
        pairs = self.segment(local_copy(state.variables), [self._cases[i] for i in mine])
        for i, (sample, prediction) in zip(mine, pairs, strict=False):
            counts = DiceCounts.from_labels(prediction[None], sample.label[None], num_classes)
            rows[:, i] = counts.intersection[0], counts.prediction[0], counts.label[0]
            if interrupt.requested:
                stopped += 1
                break
        if process_sum(stopped):
            return None
        return DiceCounts(*process_sum(rows)).compute()

    def segment(
        self, variables: dict[str, Any], cases: Sequence[Case]
    ) -> Iterator[tuple[Sample, np.ndarray]]:
        """Segments cases one after the other.

        Yields:
          The normalized case and the predicted class of each voxel [X, Y, Z], both on the scan's
          own grid.
        """
        predict = functools.partial(self._predict, variables)
        # One case is read while the one before is segmented.
        with ThreadPoolExecutor(1) as pool:
            loading = [pool.submit(self._load, case) for case in cases[:1]]
            for i in range(len(cases)):
                sample, image, grid = loading.pop().result()
                loading += [pool.submit(self._load, case) for case in cases[i + 1 : i + 2]]
                restorer = Restorer(grid, self._config.out_channels)
                blocks = stream_logits(
                    image,
                    predict,
                    self._config.out_channels,
                    self._config.img_size,
                    overlap=self._overlap,
                    batch_size=windows_per_device(jax.default_backend()),
                    device=jax.local_devices()[0],
                )
                for start, logits in blocks:
                    restorer.add(start, logits)
                yield sample, restorer.labels

    def _load(self, case: Case) -> tuple[Sample, np.ndarray, ModelGrid]:
        """Reads a case: normalized on its own grid, its image on the model's grid, and that grid.

        The file was checked before training; it is read for each validation since the volumes of
        all validation cases may be more than memory holds.
        """
        volume, labels = read_case(self._dataset, case)
        image = self._preprocessing.normalize(volume)
        grid = self._preprocessing.grid(image, volume.spacing)
        sample = Sample(case.name, image, labels, volume.spacing)
        return sample, grid.sample_image(image), grid
