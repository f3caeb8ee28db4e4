"""Validation: whole volumes, segmented window by window, judged on their own grids."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from scipy import ndimage

from train.data.decathlon import Case
from train.data.preprocess import Sample, load_case
from train.interrupt import Interrupt
from train.sharding import local_copy, process_sum, windows_per_call
from train.state import TrainState
from train.step import make_predict
from unetr_flax import sliding_window_inference
from unetr_flax.evaluation.dice import DiceCounts, DiceScores
from unetr_flax.imaging.padding import centered_start, crop_or_pad


class Evaluator:
    """Segments cases and computes their Dice.

    Args:
      model: a UNETR; its img_size is the window.
      cases: what to segment.
      modalities: name of each channel.
      spacing: mm per voxel at which the model works; each case's own if None.
      overlap: fraction of the window that neighbors share.
    """

    def __init__(
        self,
        model: nn.Module,
        cases: Sequence[Case],
        modalities: Sequence[str],
        spacing: Sequence[float] | None,
        overlap: float,
    ):
        self._config = model.config
        self._predict = make_predict(model)
        self._cases = cases
        self._modalities = modalities
        self._spacing = spacing
        self._overlap = overlap

    def __call__(self, state: TrainState, interrupt: Interrupt) -> DiceScores | None:
        """Dice over all cases, each process doing its share; None if interrupted meanwhile."""
        num_classes = self._config.out_channels
        mine = range(jax.process_index(), len(self._cases), jax.process_count())
        # Every process fills in its own rows, so that their sum is the whole.
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
        """Each case on its own grid, and the predicted class of each voxel, int32 [X, Y, Z]."""
        predict = functools.partial(self._predict, variables)
        # One case is read while the one before is segmented.
        with ThreadPoolExecutor(1) as pool:
            loading = [pool.submit(self._load, case) for case in cases[:1]]
            for i in range(len(cases)):
                own, resampled = loading.pop().result()
                loading += [pool.submit(self._load, case) for case in cases[i + 1 : i + 2]]
                shape = resampled.label.shape
                window = np.maximum(shape, self._config.img_size)
                start = centered_start(shape, window)
                # The background that training crops are filled with.
                image = crop_or_pad(resampled.image, start, window, fill=resampled.background)
                logits = sliding_window_inference(
                    image[None],
                    self._config.img_size,
                    predict,
                    overlap=self._overlap,
                    mode="gaussian",
                    batch_size=windows_per_call(),
                )[0]
                logits = crop_or_pad(logits, [-s for s in start], shape)
                yield own, _classes(logits, own.label.shape)

    def _load(self, case: Case) -> tuple[Sample, Sample]:
        own = load_case(case, self._modalities)
        if self._spacing is None:
            return own, own
        return own, load_case(case, self._modalities, self._spacing)


def _classes(logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The most likely class of each voxel, after resampling the logits linearly to a grid."""
    if logits.shape[:-1] != shape:
        zoom = [new / old for new, old in zip(shape, logits.shape, strict=False)]
        channels = [
            ndimage.zoom(logits[..., k], zoom, order=1, mode="nearest", grid_mode=True)
            for k in range(logits.shape[-1])
        ]
        logits = np.stack(channels, axis=-1)
    return logits.argmax(-1).astype(np.int32)
