import itertools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax.inference.sliding_window import sliding_window_inference

RNG = np.random.default_rng(0)
# Axes larger than the window, equal to it, and smaller by even and odd numbers of voxels.
SHAPES = [(13, 6, 9), (5, 6, 4), (3, 5, 11), (5, 3, 2)]
ROI = (5, 6, 4)
OVERLAPS = [0.0, 0.25, 0.5, 0.9]


def place_dependent(windows):
    """Computes logits [b, *roi, 2] that depend on a voxel's place in its window."""
    roi = windows.shape[1:-1]
    ramp = jnp.arange(math.prod(roi), dtype=windows.dtype).reshape(*roi, 1) / math.prod(roi)
    first = windows[..., :1] * (1 + ramp) + windows.mean((1, 2, 3, 4), keepdims=True)
    return jnp.concatenate([first, windows[..., 1:] - ramp**2], -1)


def double_loop(volume, roi, predictor, overlap, mode, sigma_scale=0.125):
    """Blends one window and one voxel at a time."""
    spatial = volume.shape[1:-1]
    pads = [max(r - s, 0) for s, r in zip(spatial, roi, strict=True)]
    padded = np.pad(volume, [(0, 0), *[(p // 2, p - p // 2) for p in pads], (0, 0)])
    starts = []
    for size, r in zip(padded.shape[1:-1], roi, strict=True):
        step = r if size == r else max(int(r * (1 - overlap)), 1)
        axis = [0]
        while axis[-1] + r < size:
            axis.append(min(axis[-1] + step, size - r))
        starts.append(axis)
    total, weights = 0, np.zeros(padded.shape[:-1])
    for b in range(len(volume)):
        for start in itertools.product(*starts):
            window = tuple(slice(s, s + r) for s, r in zip(start, roi, strict=True))
            logits = np.asarray(predictor(padded[b, *window][None]))[0]
            if np.isscalar(total):
                total = np.zeros((*padded.shape[:-1], logits.shape[-1]))
            for at in np.ndindex(*roi):
                weight = 1.0
                if mode == "gaussian":
                    exponents = [
                        (i - (r - 1) / 2) ** 2 / (2 * (sigma_scale * r) ** 2)
                        for i, r in zip(at, roi, strict=True)
                    ]
                    weight = max(math.exp(-sum(exponents)), 1e-3)
                voxel = (b, *(s + i for s, i in zip(start, at, strict=True)))
                total[voxel] += weight * logits[at]
                weights[voxel] += weight
    crop = tuple(slice(p // 2, p // 2 + s) for p, s in zip(pads, spatial, strict=True))
    return (total / weights[..., None])[:, *crop]


@pytest.mark.parametrize("overlap", OVERLAPS[1:])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_double_loop(shape, mode, overlap):
    with jax.enable_x64(True):
        volume = RNG.normal(size=(2, *shape, 2))
        predictor = jax.jit(place_dependent)
        actual = sliding_window_inference(volume, ROI, predictor, overlap, mode, batch_size=5)
        expected = double_loop(volume, ROI, predictor, overlap, mode)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_sigma_scale_widens_the_gaussian():
    volume = RNG.normal(size=(2, 7, 8, 9, 2)).astype(np.float32)
    for sigma_scale in (0.1, 0.4):
        actual = sliding_window_inference(
            volume, ROI, place_dependent, 0.5, "gaussian", sigma_scale=sigma_scale
        )
        expected = double_loop(volume, ROI, place_dependent, 0.5, "gaussian", sigma_scale)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("shape", [(7,), (5, 9), *SHAPES, (3, 4, 2, 5)])
def test_identity_returns_the_volume(shape, overlap):
    # Sums of small integers are exact.
    volume = RNG.integers(-50, 50, (2, *shape, 3)).astype(np.float32)
    roi = (3, 4, 2, 3)[: len(shape)]
    constant = sliding_window_inference(volume, roi, lambda x: x, overlap, "constant")
    np.testing.assert_array_equal(constant, volume)
    gaussian = sliding_window_inference(volume, roi, lambda x: x, overlap, "gaussian")
    np.testing.assert_allclose(gaussian, volume, rtol=2e-6)


def test_result_does_not_depend_on_the_batch_size():
    volume = RNG.normal(size=(2, 13, 6, 9, 2)).astype(np.float32)
    one, many = (
        sliding_window_inference(jnp.asarray(volume), ROI, jax.jit(place_dependent), batch_size=n)
        for n in (1, 64)
    )
    np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-6)


def test_predictor_compiles_once_for_all_volumes_of_enough_windows():
    traced = []

    @jax.jit
    def predictor(windows):
        traced.append(windows.shape)
        return windows

    for batch, *shape in [(1, 13, 6, 9), (4, 5, 6, 4), (3, 3, 5, 11), (1, 20, 7, 3)]:
        sliding_window_inference(np.ones((batch, *shape, 2), np.float32), ROI, predictor)
    assert traced == [(4, *ROI, 2)]


def test_fewer_windows_than_the_batch_are_not_filled_up():
    seen = []

    def predictor(windows):
        seen.append(windows.shape)
        return windows

    volume = RNG.normal(size=(1, 5, 9, 4, 1)).astype(np.float32)
    actual = sliding_window_inference(volume, ROI, predictor, batch_size=7)
    assert seen == [(2, *ROI, 1)]
    np.testing.assert_allclose(actual, volume, rtol=1e-6)


def test_progress_counts_windows():
    told = []
    volume = np.ones((2, 5, 13, 4, 1), np.float32)
    sliding_window_inference(
        volume, ROI, lambda x: x, batch_size=4, progress=lambda *counts: told.append(counts)
    )
    assert told == [(4, 6), (6, 6)]


@pytest.mark.parametrize("overlap", [0.25, 0.7])
def test_device_and_host_add_up_the_same(overlap):
    volume = RNG.normal(size=(2, 13, 6, 9, 2)).astype(np.float32)
    predictor = jax.jit(place_dependent)
    device, host = (
        sliding_window_inference(
            volume, ROI, predictor, overlap, "gaussian", batch_size=5, accumulate=place
        )
        for place in ("device", "host")
    )
    assert isinstance(device, np.ndarray)
    np.testing.assert_allclose(device, host, rtol=1e-5, atol=1e-6)


def test_outputs_keep_the_structure_in_which_the_predictor_returns_them():
    volume = RNG.normal(size=(1, 9, 6, 7, 1)).astype(np.float32)

    def pair(windows):
        return windows, -windows

    first, second = sliding_window_inference(volume, ROI, pair)
    np.testing.assert_allclose(first, -second)
    named = sliding_window_inference(volume, ROI, lambda x: {"a": x, "b": x[:, ::5, ::2, ::2]})
    assert {k: v.shape for k, v in named.items()} == {"a": (1, 9, 6, 7, 1), "b": (1, 1, 3, 3, 1)}
    np.testing.assert_allclose(named["a"], first)


def test_bfloat16_logits_are_blended_in_float32():
    volume = RNG.normal(size=(2, 9, 6, 7, 1)).astype(np.float32)
    logits = sliding_window_inference(volume, ROI, lambda x: jnp.asarray(x, jnp.bfloat16), 0.5)
    assert logits.dtype == np.float32
    expected = np.asarray(jnp.asarray(volume, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_memory_is_what_the_docstring_says():
    volume = np.ones((1, 40, 36, 44, 1), np.float32)
    roi, classes, batch = (16, 16, 16), 5, 2

    def predictor(windows):
        return np.repeat(windows, classes, axis=-1)

    tracemalloc.start()
    sliding_window_inference(volume, roi, predictor, 0.5, "gaussian", batch_size=batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batches = 2 * batch * math.prod(roi) * (1 + classes)
    sums = (classes + 1) * volume.size
    # The weights of a window in float64, and what Python needs.
    assert peak <= 4 * (batches + sums) + 8 * 3 * math.prod(roi) + 2**17


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volume": np.zeros((4, 2))}, r"volume: shape \(4, 2\), must be \[B, \*spatial, C\]"),
        ({"volume": np.zeros((2, 0, 6, 1))}, r"volume: shape \(2, 0, 6, 1\), must"),
        ({"roi_size": (4, 4, 4)}, r"roi_size=\(4, 4, 4\): must be an integer, or 2 integers"),
        ({"roi_size": (4, 2.5)}, r"roi_size=\(4, 2\.5\): must be an integer, or 2"),
        ({"roi_size": "96"}, "roi_size='96': must be an integer"),
        ({"overlap": 1.0}, r"overlap=1\.0: must be in \[0, 1\)"),
        ({"overlap": -0.1}, r"overlap=-0\.1: must be in \[0, 1\)"),
        ({"mode": "linear"}, 'mode=\'linear\': must be "constant" or "gaussian"'),
        ({"mode": "gaussian", "sigma_scale": 0}, "sigma_scale=0: must be above 0"),
        ({"batch_size": 0}, "batch_size: 0, must be a positive integer"),
        ({"overlap": (0.5, 0.5, 0.5)}, r"overlap=\(0\.5, 0\.5, 0\.5\): must be in \[0, 1\), one"),
        ({"overlap": (0.5,)}, r"overlap=\(0\.5,\): must be"),
        ({"overlap": "half"}, "overlap='half': must be"),
        ({"padding_mode": "edge"}, "padding_mode='edge': must be one of"),
        ({"accumulate": "gpu"}, "accumulate='gpu': must be"),
        ({"volume": np.zeros((2, 1, 9, 9))}, r"volume: shape \(2, 1, 9, 9\) seems to have its 1"),
        ({"predictor": lambda x: x[..., 0]}, r"predictor: returned shape \(4, 4, 3\) and dtype"),
        (
            {"predictor": lambda x: x[:1]},
            r"returned shape \(1, 4, 3, 1\) .*\[4, \*out, K",
        ),
        ({"predictor": lambda x: x > 0}, "predictor: returned .* dtype bool, must be real numbers"),
        ({"predictor": lambda x: None}, "predictor: returned an object of type NoneType, must be"),
        ({"predictor": lambda x: (x, "b")}, r"predictor: returned a tuple of \['ndarray', 'str'\]"),
        ({"predictor": lambda x: {"a": [x]}}, "predictor: returned a dict of {'a': 'list'}, must"),
        ({"predictor": lambda x: ()}, r"predictor: returned a tuple of \[\], must hold an array"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"volume": np.zeros((2, 5, 6, 1)), "roi_size": (4, 3), "predictor": lambda x: x}
    with pytest.raises(ValueError, match=message):
        sliding_window_inference(**(arguments | change))
