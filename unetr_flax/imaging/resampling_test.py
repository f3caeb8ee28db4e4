import subprocess
import sys

import numpy as np
import pytest

from unetr_flax.imaging.resampling import resample_linear, resample_nearest, resampled_shape

ndimage = pytest.importorskip("scipy.ndimage")


def test_shape_covers_the_extent():
    assert resampled_shape((10, 10, 10), (1, 2, 0.5), (1, 0.5, 2)) == (10, 40, 2)
    assert resampled_shape((3, 3, 3), (1, 1, 1), (100, 1.1, 0.9)) == (1, 3, 3)


def test_interpolation_is_between_centers_of_voxels():
    ramp = np.arange(9, dtype=np.float32)
    image = np.stack([ramp, 10 - 2 * ramp], -1)[:, None, None]
    fine = resample_linear(image, (18, 3, 1))
    assert fine.shape == (18, 3, 1, 2)
    assert fine.dtype == np.float32
    # Centers of the fine voxels, in coarse voxels; beyond the outermost the value is constant.
    centers = np.clip((np.arange(18) + 0.5) / 2 - 0.5, 0, 8)
    for y in range(3):
        np.testing.assert_allclose(fine[:, y, 0, 0], centers, atol=1e-6)
        np.testing.assert_allclose(fine[:, y, 0, 1], 10 - 2 * centers, atol=1e-6)


def test_labels_are_those_of_the_nearest_voxels():
    labels = np.array([0, 5, 5, 2], np.int32)[:, None, None]
    fine = resample_nearest(labels, (12, 1, 2))
    assert fine.dtype == np.int32
    np.testing.assert_array_equal(fine[:, 0, 0], np.repeat([0, 5, 5, 2], 3))
    np.testing.assert_array_equal(resample_nearest(fine, (4, 1, 1)), labels)


def test_an_unchanged_shape_is_the_array_itself_as_interpolation_would_have_it():
    image = np.random.default_rng(0).normal(size=(7, 5, 6, 2)).astype(np.float32)
    assert resample_linear(image, (7, 5, 6)) is image
    labels = np.arange(7 * 5 * 6, dtype=np.int32).reshape(7, 5, 6)
    assert resample_nearest(labels, (7, 5, 6)) is labels
    options = {"zoom": [1.0, 1.0, 1.0], "mode": "nearest", "grid_mode": True}
    np.testing.assert_array_equal(ndimage.zoom(image[..., 0], order=1, **options), image[..., 0])
    np.testing.assert_array_equal(ndimage.zoom(labels, order=0, **options), labels)


def test_without_scipy_the_extra_is_named():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import numpy as np\n"
        "from unetr_flax.imaging.resampling import resample_nearest\n"
        "try: resample_nearest(np.zeros((2, 2, 2)), (1, 1, 1))\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "resampling needs scipy: pip install 'unetr-flax[volumes]'\n"
