"""`sliding_window_inference` against MONAI's, argument by argument."""

import itertools

import numpy as np
import pytest
import torch
from monai.inferers.utils import sliding_window_inference as monai_inference

from unetr_flax import sliding_window_inference

RNG = np.random.default_rng(0)


def place_dependent(windows):
    """Computes outputs [b, *roi, 2C] that depend on a voxel's place in its window."""
    roi = windows.shape[1:-1]
    ramp = np.linspace(0, 1, int(np.prod(roi)), dtype=windows.dtype).reshape(*roi, 1)
    return np.concatenate([windows * (1 + ramp), windows - ramp**2], axis=-1)


def half(windows):
    """Computes outputs of half the resolution in each axis."""
    steps = (slice(None), *(slice(None, None, 2),) * (windows.ndim - 2))
    return place_dependent(windows)[steps]


def in_torch(predictor):
    """Wraps a predictor of channels-last arrays for channels-first tensors."""

    def first(array):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))

    def call(windows):
        outputs = predictor(np.moveaxis(windows.numpy(), 1, -1))
        if isinstance(outputs, dict):
            return {key: first(value) for key, value in outputs.items()}
        return tuple(map(first, outputs)) if isinstance(outputs, tuple) else first(outputs)

    return call


def assert_equal(volume, roi, predictor, overlap, mode, sigma_scale, batch_size, **options):
    ours = sliding_window_inference(
        volume, roi, predictor, overlap, mode, sigma_scale, batch_size, **options
    )
    arguments = {"overlap": overlap, "mode": mode, "sigma_scale": sigma_scale} | options
    theirs = monai_inference(
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume, -1, 1))),
        roi,
        batch_size,
        in_torch(predictor),
        **arguments,
    )
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = zip(*((ours[key], theirs[key]) for key in ours), strict=True)
    if not isinstance(ours, tuple | list):
        ours, theirs = [ours], [theirs]
    for a, b in zip(ours, theirs, strict=True):
        b = np.moveaxis(b.numpy(), 1, -1)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-6 * max(1, np.abs(b).max())


SHAPES = [(23,), (9, 14), (12, 9, 15), (5, 16, 7)]
ROIS = {1: [(8,), 6, (-1,)], 2: [(8, 4), 6, (None, 6)], 3: [(6, 8, 4), 8, (8, -1, 6)]}


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_and_weights(shape, mode):
    axes = len(shape)
    volume = RNG.normal(size=(2, *shape, 2)).astype(np.float32)
    overlaps = [0.0, 0.25, (0.5, 0.6, 0.3)[:axes]]
    sigmas = [0.125, (0.1, 0.3, 0.2)[:axes]]
    for roi, overlap, sigma in itertools.product(ROIS[axes], overlaps, sigmas):
        assert_equal(volume, roi, place_dependent, overlap, mode, sigma, 3)


@pytest.mark.parametrize("padding_mode", ["constant", "reflect", "replicate", "circular"])
def test_padding(padding_mode):
    volume = RNG.normal(size=(1, 5, 7, 9, 1)).astype(np.float32)
    # PyTorch refuses a value where it would not be used.
    options = {"padding_mode": padding_mode, "cval": -1.5 if padding_mode == "constant" else 0.0}
    assert_equal(volume, (8, 8, 8), place_dependent, 0.25, "gaussian", 0.125, 4, **options)


def test_several_outputs_of_several_resolutions():
    volume = RNG.normal(size=(2, 12, 7, 16, 1)).astype(np.float32)

    def named(windows):
        return {"whole": place_dependent(windows), "other": -place_dependent(windows)}

    # Windows of even size at even places, so that halves are whole numbers.
    assert_equal(volume, (8, 8, 8), named, 0.25, "gaussian", 0.125, 3)
    for mode in ("constant", "gaussian"):
        assert_equal(volume, (8, 8, 8), half, 0.25, mode, 0.125, 3)
        both = lambda x: (place_dependent(x), half(x))  # noqa: E731
        assert_equal(volume, (8, 8, 8), both, 0.5, mode, 0.125, 3)
