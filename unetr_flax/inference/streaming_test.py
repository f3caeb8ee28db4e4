import itertools
import math
import tracemalloc

import jax
import numpy as np
import pytest

from unetr_flax.imaging.intensity import background
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.padding import centered_start, crop_or_pad
from unetr_flax.imaging.restore import Restorer
from unetr_flax.inference import accumulators, streaming
from unetr_flax.inference.sliding_window import sliding_window_inference
from unetr_flax.inference.sliding_window_test import place_dependent
from unetr_flax.inference.streaming import stream_logits

RNG = np.random.default_rng(0)
ROI = (5, 6, 4)
CPU = jax.devices("cpu")[0]


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def whole(image, overlap):
    """Computes the logits of a whole image by the plain function."""
    size = np.maximum(image.shape[:-1], ROI).tolist()
    start = centered_start(image.shape[:-1], size)
    filled = crop_or_pad(image, start, size, fill=background(image))
    logits = sliding_window_inference(filled[None], ROI, place_dependent, overlap, "gaussian")[0]
    return crop_or_pad(logits, [-s for s in start], image.shape[:-1])


@pytest.mark.parametrize("max_bytes", [1, 4 * 5 * 6 * 9 * 3, 2**30])
@pytest.mark.parametrize("shape", [(13, 6, 9), (3, 17, 5), (6, 9, 16), (2, 3, 3)])
def test_blocks_are_the_logits_of_the_whole(monkeypatch, shape, max_bytes):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 700)
    image = RNG.normal(size=(*shape, 2)).astype(np.float32)
    for overlap, batch_size in itertools.product((0.25, 0.7), (1, 3)):
        expected = whole(image, overlap)
        found = np.full_like(expected, np.nan)
        counts: list[tuple[int, int]] = []
        for start, block in stream_logits(
            image,
            jax.jit(place_dependent),
            2,
            ROI,
            overlap=overlap,
            batch_size=batch_size,
            device=CPU,
            max_bytes=max_bytes,
            progress=lambda *done, counts=counts: counts.append(done),
        ):
            there = tuple(slice(s, s + n) for s, n in zip(start, block.shape, strict=False))
            np.testing.assert_array_equal(
                np.isnan(found[there]) | np.isclose(found[there], block, 1e-5, 1e-5), True
            )
            found[there] = block
        assert_close(found, expected)
        assert counts[-1][0] == counts[-1][1]


def test_an_accelerator_with_memory_adds_up_by_itself(monkeypatch):
    monkeypatch.setattr(streaming, "fits_on", lambda *_: True)
    image = RNG.normal(size=(13, 6, 9, 2)).astype(np.float32)
    expected = whole(image, 0.5)
    monkeypatch.setattr(accumulators.HostAccumulator, "add", None)
    found = np.zeros((13, 6, 9, 2), np.float32)
    for start, block in stream_logits(
        image, jax.jit(place_dependent), 2, ROI, overlap=0.5, batch_size=3, device=CPU, max_bytes=1
    ):
        found[start[0] : start[0] + len(block)] = block
    assert_close(found, expected)


@pytest.mark.parametrize("box", [(13, 6, 9), (20, 11, 5), (7, 13, 9), (1, 40, 2)])
def test_labels_from_blocks_are_those_of_interpolated_logits(monkeypatch, box):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 900)
    shape = (13, 6, 9)
    scan = tuple(b + 3 for b in box)
    grid = ModelGrid(scan, (1, 2, 0), box, shape, (1.0, 1.0, 1.0))
    image = RNG.normal(size=(*shape, 1)).astype(np.float32)

    def predict(windows):
        return np.concatenate([windows, -windows, 0.3 - windows**2], axis=-1)

    logits = sliding_window_inference(image[None], ROI, predict, 0.5, "gaussian")[0]
    restored = grid.restore_logits(logits)
    for max_bytes in (1, 2**30):
        probabilities = np.zeros((*scan, 3), np.float32)
        plain, soft = Restorer(grid, 3), Restorer(grid, 3, probabilities)
        for start, block in stream_logits(
            image, predict, 3, ROI, overlap=0.5, batch_size=2, device=CPU, max_bytes=max_bytes
        ):
            plain.add(start, block)
            soft.add(start, block)
        np.testing.assert_array_equal(plain.labels, soft.labels)
        assert plain.labels.dtype == np.uint8
        expected = np.asarray(jax.nn.softmax(restored, axis=-1))
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-5)
        # Where two classes are equally likely to rounding, either is right.
        ordered = np.sort(restored, axis=-1)
        clear = ordered[..., -1] - ordered[..., -2] > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(plain.labels[clear], restored.argmax(-1)[clear])


def test_memory_is_that_of_one_layer_of_windows(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 2**16)
    image = np.ones((96, 36, 44, 1), np.float32)
    roi, classes = (16, 16, 16), 20

    def predictor(windows):
        return np.repeat(windows, classes, axis=-1)

    def peak(max_bytes):
        tracemalloc.start()
        for _ in stream_logits(
            image,
            predictor,
            classes,
            roi,
            overlap=0.5,
            batch_size=1,
            device=CPU,
            max_bytes=max_bytes,
        ):
            pass
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    layer = 4 * (classes + 1) * roi[0] * 36 * 44
    window = 4 * math.prod(roi) * (1 + classes)
    # Blocks are copied with the plane that they share, of which one is kept; weights of a window
    # are in float64 and float32.
    rest = window + 4 * classes * 3 * 36 * 44 + 12 * math.prod(roi) + 2 * 2**16 + 2**18
    assert peak(2**30) <= layer + rest
    assert peak(layer // 3) <= layer // 3 + rest
