"""Validation: whole scans, segmented window by window and judged on their own grids."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from train.data.cases import read_case
from train.data.dataset import Case, Dataset
from train.data.preprocess import Sample
from train.distributed import process_sum
from train.interrupt import Interrupt
from train.scores import COUNTS, FIELDS, CaseScores, Validation, judge
from train.sharding import local_copy
from train.state import TrainState
from unetr_flax import Preprocessing, UNETRConfig
from unetr_flax.evaluation.dice import DiceScores
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore import Restorer
from unetr_flax.imaging.restore_regions import RegionRestorer
from unetr_flax.inference.predictor import windows_per_device
from unetr_flax.inference.streaming import stream_logits


class Evaluator:
    """Segments cases and scores them.

    Args:
      predict: (variables, windows [B, *img_size, C]) -> logits [B, *img_size, K], as that of
        `make_predict`.
      model_config: the model's configuration; its img_size is the window.
      dataset: the data set of the cases.
      cases: cases to segment.
      preprocessing: preparation of a scan for the model, which is undone for the logits.
      overlap: fraction of the window that neighbors share.
      windows: number of windows that are segmented at once; as many as suit the device if None.
    """

    def __init__(
        self,
        predict: Callable[[Any, np.ndarray], Any],
        model_config: UNETRConfig,
        dataset: Dataset,
        cases: Sequence[Case],
        preprocessing: Preprocessing,
        overlap: float,
        windows: int | None = None,
    ):
        self._predict = predict
        self._config = model_config
        self._dataset = dataset
        self._cases = cases
        self._preprocessing = preprocessing
        self._overlap = overlap
        if windows is None:
            windows = windows_per_device(jax.default_backend(), model_config.img_size)
        self._windows = windows

    def __call__(self, state: TrainState, interrupt: Interrupt) -> Validation | None:
        """Scores all cases, each process doing its share; None if interrupted.

        A case is scored while the next one is segmented. Without any case all scores are nan.
        """
        if not self._cases:
            return Validation(DiceScores(np.full(len(self._dataset.labels), np.nan), math.nan))
        mine = list(range(jax.process_index(), len(self._cases), jax.process_count()))
        judged: list[Future[CaseScores]] = []
        pairs = self.segment(
            local_copy(state.variables),
            [self._cases[i] for i in mine],
            stop=lambda: interrupt.requested,
        )
        with ThreadPoolExecutor(1) as pool:
            for sample, prediction in pairs:
                if judged:
                    # No more than one case waits for its scores.
                    judged[-1].result()
                judged.append(
                    pool.submit(judge, self._dataset, prediction, sample.label, sample.spacing)
                )
            scores = [future.result() for future in judged]
        if process_sum(np.array(len(scores) < len(mine), np.int32)):
            return None
        return Validation.of_cases(
            [case.name for case in self._cases], self._from_all_processes(mine, scores)
        )

    def _from_all_processes(
        self, mine: Sequence[int], scores: Sequence[CaseScores]
    ) -> list[CaseScores]:
        """Merges the scores of all processes' cases, in the order of the cases."""
        labels = len(self._dataset.labels)
        # Every process fills in the rows of its own cases, so that the sum has all rows.
        counts = np.zeros((len(self._cases), len(COUNTS), labels), np.int64)
        rows = np.zeros((len(self._cases), labels - 1, len(FIELDS)), np.float64)
        for i, case in zip(mine, scores, strict=True):
            counts[i], rows[i] = case
        # Bits are summed, as JAX would round numbers of 64 bits to 32.
        counts, rows = (
            process_sum(array.view(np.int32)).astype(np.int32).view(array.dtype)
            for array in (counts, rows)
        )
        return [CaseScores(*case) for case in zip(counts, rows, strict=True)]

    def segment(
        self,
        variables: dict[str, Any],
        cases: Sequence[Case],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[Sample, np.ndarray]]:
        """Segments cases one after the other.

        Args:
          variables: "params" and "batch_stats".
          cases: which cases.
          stop: ends this early when true; asked after every few windows.

        Yields:
          The normalized case, and what is predicted for each voxel [X, Y, Z], integers as in its
          target (see `train.data.targets`), both on the scan's own grid.
        """
        predict = functools.partial(self._predict, variables)
        restorer_of = RegionRestorer if self._dataset.has_regions else Restorer
        # One case is read while the one before is segmented.
        with ThreadPoolExecutor(1) as pool:
            loading = [pool.submit(self._load, case) for case in cases[:1]]
            for i in range(len(cases)):
                sample, image, grid = loading.pop().result()
                loading += [pool.submit(self._load, case) for case in cases[i + 1 : i + 2]]
                restorer = restorer_of(grid, self._config.out_channels)
                blocks = stream_logits(
                    image,
                    predict,
                    self._config.out_channels,
                    self._config.img_size,
                    overlap=self._overlap,
                    batch_size=self._windows,
                    device=jax.local_devices()[0],
                )
                for start, logits in blocks:
                    if stop():
                        return
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
