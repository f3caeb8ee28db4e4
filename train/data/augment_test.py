import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data import augment
from train.data.augment import AUGMENTATIONS, make_augment

SAMPLES = 60


@pytest.fixture(scope="module")
def sample():
    """A sample whose intensities are its labels, and every voxel is its own class."""
    label = np.arange(4 * 4 * 3, dtype=np.int32).reshape(4, 4, 3)
    return label[..., None].astype(np.float32), label


def apply(batch_augment, sample, seed=0, samples=SAMPLES):
    """Augments copies of a sample, each with a key of its own."""
    keys = jax.random.split(jax.random.key(seed), samples)
    batch = (jnp.broadcast_to(x, (samples, *x.shape)) for x in sample)
    return [np.asarray(x) for x in jax.jit(batch_augment)(keys, *batch)]


def test_flips_are_numpy_s_and_follow_their_axes(sample):
    image, label = apply(make_augment([], flips=(2, 0)), sample)
    np.testing.assert_array_equal(image[..., 0], label)
    expected = [np.flip(sample[1], axes).tobytes() for axes in ((), (0,), (2,), (0, 2))]
    counts = [sum(x.tobytes() == e for x in label) for e in expected]
    assert sum(counts) == SAMPLES
    assert min(counts) > 5


def test_rotations_are_numpy_s(sample):
    image, label = apply(make_augment([], rotate90_probability=0.75), sample)
    np.testing.assert_array_equal(image[..., 0], label)
    expected = [np.rot90(sample[1], k).tobytes() for k in range(4)]
    counts = [sum(x.tobytes() == e for x in label) for e in expected]
    assert sum(counts) == SAMPLES
    assert min(counts) > 5


def test_a_probability_is_kept(sample):
    image, label = apply(make_augment([], flips=(1,), flip_probability=0.1), sample, samples=600)
    flipped = (label[:, 0, 0, 0] != 0).mean()
    assert 0.06 < flipped < 0.14
    shift = augment.sometimes(0.1, augment.random_shift(0.1))
    image, label = apply(make_augment([shift]), sample, samples=600)
    assert 0.06 < (image[:, 0, 0, 0, 0] != 0).mean() < 0.14
    assert np.abs(image[:, 0, 0, 0, 0]).max() <= 0.1


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [(augment.random_scale(0.75, 1.25), 0.75, 1.25), (augment.random_shift(0.1), -0.1, 0.1)],
)
def test_numbers_are_drawn_from_the_whole_range(change, low, high):
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = jax.vmap(change, (0, None))(keys, jnp.ones((1, 1, 1, 1)))
    drawn = drawn.ravel() - (0 if low > 0 else 1)
    margin = 0.05 * (high - low)
    assert low <= drawn.min() < low + margin
    assert high - margin < drawn.max() <= high + 1e-6


def test_nnunet_s_intensities_change_the_image_alone():
    x, y, z = np.meshgrid(*map(np.arange, (8, 9, 10)), indexing="ij")
    label = ((x - 4) ** 2 + (y - 4) ** 2 + (z - 5) ** 2 < 12).astype(np.int32)
    image = (label + np.sin(0.5 * x) * np.cos(0.4 * y))[..., None].astype(np.float32)
    changes = AUGMENTATIONS["nnunet"].changes
    images, labels = apply(make_augment(changes), (image, label))
    assert all(np.array_equal(x, label) for x in labels)
    # By the probabilities of the changes, about 73 of 100 samples change.
    changed = [not np.array_equal(x, image) for x in images]
    assert 0.55 < np.mean(changed) < 0.9
    assert np.isfinite(images).all()
    assert min(np.corrcoef(x.ravel(), image.ravel())[0, 1] for x in images) > 0.5
    again, _ = apply(make_augment(changes), (image, label))
    np.testing.assert_array_equal(again, images)


@pytest.mark.parametrize(
    ("name", "amount", "deviation"), [("default", 0.1, 0.05), ("strong", 0.2, 0.1)]
)
def test_every_sample_has_another_factor_offset_and_noise(name, amount, deviation):
    image = np.linspace(-2, 2, 12 * 10 * 9, dtype=np.float32).reshape(12, 10, 9, 1)
    label = (image[..., 0] > 1).astype(np.int32)
    images, labels = apply(make_augment(AUGMENTATIONS[name].changes), (image, label))
    assert all(np.array_equal(x, label) for x in labels)
    factor, offset = np.array([np.polyfit(image.ravel(), x.ravel(), 1) for x in images]).T
    fitted = factor * image.ravel()[:, None] + offset
    noise = (images.reshape(SAMPLES, -1) - fitted.T).std(1)
    # The fit is off by the noise's share of it.
    margin = 0.1 * amount
    for change in (factor - 1, offset):
        assert -amount - margin < change.min() < -0.7 * amount
        assert 0.7 * amount < change.max() < amount + margin
    assert abs(np.corrcoef(factor, offset)[0, 1]) < 0.5
    assert noise.min() < 0.2 * deviation
    assert 0.8 * deviation < noise.max() < 1.1 * deviation


def test_nothing_to_do_is_no_augmentation():
    assert make_augment(AUGMENTATIONS["none"].changes) is None
    assert make_augment([], flips=(0,), flip_probability=0.0) is None
