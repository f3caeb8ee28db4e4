import numpy as np

from train.data.preprocess import make_sample
from unetr_flax import Preprocessing
from unetr_flax.imaging.volume import Volume

SHAPE = (9, 7, 6)
SPACING = (1.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])


def test_image_and_label_are_brought_to_the_same_grid():
    x = np.broadcast_to(np.arange(9)[:, None, None], SHAPE)
    labels = np.where(x < 4, 0, 3).astype(np.int32)
    # The ramp lies within the CT window, so it is not clipped.
    volume = Volume((20 * x[..., None] - 100).astype(np.float32), AFFINE)
    own = make_sample("case", volume, labels, Preprocessing.from_modalities(["CT"]))
    np.testing.assert_allclose(own.image[:, 3, 2, 0], (20 * np.arange(9) - 100 + 175) / 425)
    np.testing.assert_array_equal(own.label, labels)
    assert own.name == "case"
    assert own.spacing == SPACING
    preprocessing = Preprocessing.from_modalities(["CT"], spacing=(0.5, 2.0, 3.0))
    fine = make_sample("case", volume, labels, preprocessing)
    assert fine.image.shape == (18, 7, 6, 1)
    assert fine.spacing == (0.5, 2.0, 3.0)
    # Centers of the fine voxels, in coarse voxels.
    centers = (np.arange(18) + 0.5) / 2 - 0.5
    ramp = np.interp(centers, np.arange(9), own.image[:, 0, 0, 0])
    np.testing.assert_allclose(fine.image[:, 3, 2, 0], ramp, atol=1e-5)
    np.testing.assert_array_equal(fine.label[:, 3, 2], np.where(centers < 3.5, 0, 3))


def test_labels_are_cropped_with_the_foreground():
    array = np.zeros((*SHAPE, 1), np.float32)
    array[3:5, 1:6, 2:4] = 100
    labels = (array[..., 0] > 0).astype(np.int32)
    array[3, 1, 2] = 120
    preprocessing = Preprocessing.from_modalities(["CT"], crop_foreground=True)
    sample = make_sample("case", Volume(array, AFFINE), labels, preprocessing)
    assert sample.image.shape == (2, 5, 2, 1)
    np.testing.assert_array_equal(sample.label, np.ones((2, 5, 2)))


def test_background_is_the_lowest_intensity_and_foreground_is_labeled():
    array = np.random.default_rng(0).gamma(3.0, 60.0, (*SHAPE, 2)).astype(np.float32)
    labels = np.random.default_rng(1).integers(-1, 3, SHAPE).astype(np.int32)
    preprocessing = Preprocessing.from_modalities(["T1", "T2"])
    sample = make_sample("case", Volume(array, AFFINE), labels, preprocessing)
    np.testing.assert_array_equal(sample.background, sample.image.min((0, 1, 2)))
    np.testing.assert_array_equal(sample.label.ravel()[sample.foreground] > 0, True)
    assert len(sample.foreground) == (labels > 0).sum()
