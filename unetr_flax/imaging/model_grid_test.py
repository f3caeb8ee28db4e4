import numpy as np
import pytest

from unetr_flax.imaging.model_grid import ModelGrid, foreground_box

pytest.importorskip("scipy")

SHAPE = (8, 10, 6)
WHOLE = ModelGrid(SHAPE, (0, 0, 0), SHAPE, SHAPE, (1, 1, 1))
BOX = ModelGrid(SHAPE, (2, 3, 1), (4, 5, 3), (4, 5, 3), (1, 1, 1))
COARSE = ModelGrid(SHAPE, (2, 2, 1), (4, 6, 4), (2, 3, 2), (2, 2, 2))
RNG = np.random.default_rng(0)


def test_without_a_box_and_another_spacing_nothing_is_changed():
    image, labels = RNG.normal(size=(*SHAPE, 2)), RNG.integers(0, 3, SHAPE)
    assert np.shares_memory(WHOLE.sample_image(image), image)
    np.testing.assert_array_equal(WHOLE.sample_image(image), image)
    np.testing.assert_array_equal(WHOLE.restore_logits(image), image)
    np.testing.assert_array_equal(WHOLE.sample_labels(labels), labels)
    np.testing.assert_array_equal(WHOLE.restore_labels(labels), labels)


def test_a_box_is_cut_out_and_comes_back_to_its_place():
    image, labels = RNG.normal(size=(*SHAPE, 2)), RNG.integers(1, 3, SHAPE)
    box = np.s_[2:6, 3:8, 1:4]
    np.testing.assert_array_equal(BOX.sample_image(image), image[box])
    np.testing.assert_array_equal(BOX.sample_labels(labels), labels[box])
    restored = BOX.restore_labels(labels[box])
    np.testing.assert_array_equal(restored[box], labels[box])
    assert restored.sum() == labels[box].sum()


def test_outside_the_box_everything_is_background():
    logits = RNG.normal(size=(*BOX.shape, 3)).astype(np.float32) - 50
    restored = BOX.restore_logits(logits)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored[2:6, 3:8, 1:4], logits)
    classes = restored.argmax(-1)
    classes[2:6, 3:8, 1:4] = 0
    assert not classes.any()
    exponents = np.exp(restored[0, 0, 0])
    np.testing.assert_array_equal(exponents / exponents.sum(), [1, 0, 0])


def test_a_box_is_resampled_and_back():
    labels = np.zeros(SHAPE, np.int32)
    labels[2:4, 4:6, 3:5] = 2
    labels[4:6, 6:8, 1:3] = 1
    coarse = COARSE.sample_labels(labels)
    expected = np.zeros(COARSE.shape)
    expected[0, 1, 1], expected[1, 2, 0] = 2, 1
    np.testing.assert_array_equal(coarse, expected)
    np.testing.assert_array_equal(COARSE.restore_labels(coarse), labels)
    # Linear interpolation keeps a ramp, except beyond the outermost voxel centers.
    ramp = np.broadcast_to(np.arange(10.0)[:, None, None], (*SHAPE, 1))
    fine = COARSE.restore_logits(COARSE.sample_image(ramp))
    np.testing.assert_allclose(COARSE.sample_image(ramp)[:, :, :, 0][1, :, 1], [2.5, 4.5, 6.5])
    np.testing.assert_allclose(fine[3, 3:7, 2, 0], ramp[3, 3:7, 2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: BOX.sample_image(a[..., None]), r"image: spatial shape \(2, 2, 2\), must be"),
        (BOX.sample_labels, r"labels: spatial shape \(2, 2, 2\), must be \(8, 10, 6\)"),
        (lambda a: BOX.restore_logits(a[..., None]), r"logits: .*, must be \(4, 5, 3\)"),
        (BOX.restore_labels, r"labels: .*, must be \(4, 5, 3\)"),
    ],
)
def test_other_shapes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros((2, 2, 2)))


def test_foreground_is_above_the_lowest_value_of_any_channel():
    image = np.zeros((7, 8, 9, 2))
    image[..., 1] = -3
    image[2, 3, 4, 0] = 0.1
    image[5, 3, 1, 1] = -2.9
    assert foreground_box(image) == ((2, 3, 1), (4, 1, 4))
    assert foreground_box(np.ones((7, 8, 9, 2))) == ((0, 0, 0), (7, 8, 9))
    image[0, 0, 0, 0] = -1
    assert foreground_box(image) == ((0, 0, 0), (7, 8, 9))
