import itertools

import numpy as np
import pytest

from train.data.augment import Augmentation, random_crop
from train.data.batches import Batches, auto_roi
from train.data.decathlon import read_dataset
from train.data.phantoms import LABELS, make_phantom, make_phantoms
from train.data.preprocess import Sample, load_case

ROI = (8, 6, 10)


def sample(shape, seed=0, name="case"):
    """A case whose intensities tell the class and the position of every voxel."""
    label = np.random.default_rng(seed).integers(0, 2, shape).astype(np.int32)
    position = np.arange(label.size, dtype=np.float32).reshape(shape)
    return Sample(
        name,
        np.stack([label + np.float32(1), position + 1], -1).astype(np.float32),
        label,
        (1.0, 1.0, 2.0),
    )


def blobs(shape=(16, 20, 14)):
    """A smooth case, on which interpolation leaves image and label in agreement."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    label = ((x - 6) ** 2 + (y - 11) ** 2 + 2 * (z - 6) ** 2 < 30).astype(np.int32)
    return Sample("blob", label[..., None].astype(np.float32), label, (1.0, 1.0, 1.5))


def stream(seed=0, **options):
    samples = [sample((9, 5, 12 + i), seed=i, name=str(i)) for i in range(5)]
    options = {"augmentation": Augmentation(probability=1.0), **options}
    return Batches(samples, ROI, 2, seed, **options)


def take(batches, count):
    out = list(itertools.islice(batches, count))
    batches.close()
    return out


def same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_shapes_and_types():
    (batch,) = take(stream(), 1)
    assert batch["image"].shape == (2, *ROI, 2)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (2, *ROI)
    assert batch["label"].dtype == np.int32


def test_same_seed_same_stream_other_seed_other_stream():
    first = take(stream(), 6)
    assert same(first, take(stream(), 6))
    assert not same(first, take(stream(seed=1), 6))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_restored_stream_goes_on_as_the_original(steps):
    original = stream()
    for _ in range(steps):
        next(original)
    restored = stream()
    next(restored)
    restored.restore(original.state())
    assert same(take(original, 5), take(restored, 5))


def test_every_epoch_has_every_case_once():
    samples = [
        Sample(str(i), np.full((*ROI, 1), i, np.float32), np.zeros(ROI, np.int32), (1, 1, 1))
        for i in range(6)
    ]
    batches = take(Batches(samples, ROI, 2, 0, augmentation=None), 9)
    seen = np.concatenate([batch["image"][:, 0, 0, 0, 0] for batch in batches]).reshape(3, 6)
    assert [sorted(epoch) for epoch in seen.tolist()] == [[0, 1, 2, 3, 4, 5]] * 3
    assert len({tuple(epoch) for epoch in seen.tolist()}) > 1


def test_parts_of_two_processes_are_the_whole_batch():
    whole = take(stream(), 3)
    halves = [take(stream(part=(i, 2)), 3) for i in range(2)]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)
    ]
    assert same(joined, whole)


@pytest.mark.parametrize("shape", [(20, 30, 15), (3, 4, 5), (8, 6, 10), (20, 4, 10)])
@pytest.mark.parametrize("foreground_fraction", [0.0, 1.0])
def test_crop_without_augmentation_is_a_part_of_the_volume(shape, foreground_fraction):
    case = sample(shape)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, label = random_crop(case, ROI, foreground_fraction, None, rng)
        position = image[..., 1] - 1
        inside = np.zeros(ROI, bool)
        corner = [(roi - n) // 2 if n < roi else 0 for roi, n in zip(ROI, shape, strict=True)]
        inside[
            tuple(
                slice(max(c, 0), max(c, 0) + min(n, r))
                for c, n, r in zip(corner, shape, ROI, strict=True)
            )
        ] = True
        # Outside the volume is padding; within it, neighbours are the volume's neighbours.
        np.testing.assert_array_equal(label[~inside], 0)
        np.testing.assert_array_equal(position[~inside], 0)
        np.testing.assert_array_equal(
            case.label.ravel()[position[inside].astype(int)], label[inside]
        )
        assert len(np.unique(position[inside])) == inside.sum()


def test_foreground_is_found():
    label = np.zeros((40, 40, 40), np.int32)
    label[35, 3, 20] = 1
    case = Sample("needle", label[..., None].astype(np.float32), label, (1, 1, 1))
    rng = np.random.default_rng(0)
    assert all(random_crop(case, ROI, 1.0, None, rng)[1].sum() == 1 for _ in range(10))
    found = sum(random_crop(case, ROI, 0.0, None, rng)[1].sum() for _ in range(50))
    assert found < 10


def test_image_and_label_stay_aligned_under_augmentation():
    case = blobs()
    options = Augmentation(probability=1.0, intensity=0.0, noise=0.0)
    agreements = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        image, label = random_crop(case, (16, 16, 16), 0.5, options, rng)
        agreements.append(((image[..., 0] > 0.5) == label).mean())
        assert label.sum() > 20
    assert min(agreements) > 0.98


def test_augmentation_really_changes_geometry_and_intensity():
    case = blobs()
    plain = random_crop(case, (16, 20, 14), 0.0, None, np.random.default_rng(0))
    options = Augmentation(probability=1.0)
    image, label = random_crop(case, (16, 20, 14), 0.0, options, np.random.default_rng(0))
    assert not np.array_equal(label, plain[1])
    assert not np.allclose(image, plain[0], atol=0.05)


def test_errors_in_the_background_reach_the_consumer():
    batches = Batches([sample((9, 5, 12))], (8, 6), 1, 0, augmentation=None)
    with pytest.raises(ValueError, match=r"argument 2 is shorter|broadcast|shape"):
        next(batches)
    batches.close()


def test_unusable_batch_sizes():
    with pytest.raises(ValueError, match="batch_size=3: must be a multiple of 2 processes"):
        Batches([sample(ROI)], ROI, 3, 0, augmentation=None, part=(0, 2))
    with pytest.raises(ValueError, match="samples: must have"):
        Batches([], ROI, 3, 0, augmentation=None)


def test_auto_roi():
    shapes = [(35, 50, 35), (36, 51, 34), (30, 49, 40)]
    assert auto_roi(shapes, (16, 16, 8)) == (48, 64, 40)
    assert auto_roi([(512, 512, 20)], (16, 16, 8)) == (96, 96, 24)


def test_phantoms_are_a_data_set_that_loads(tmp_path):
    make_phantoms(tmp_path / "phantoms", 3, seed=0)
    dataset = read_dataset(tmp_path / "phantoms")
    assert dataset.labels == LABELS
    for i, case in enumerate(dataset.cases):
        loaded = load_case(case, dataset.modalities)
        _, label, _ = make_phantom(np.random.default_rng((0, i)))
        np.testing.assert_array_equal(loaded.label, label)
        assert set(np.unique(label)) == set(range(len(LABELS)))
        assert loaded.image.min() == 0
        assert loaded.image.max() == 1
        assert loaded.spacing[2] > 1.3 * loaded.spacing[0]
    with pytest.raises(FileExistsError):
        make_phantoms(tmp_path / "phantoms", 3, seed=0)
    assert not [path for path in tmp_path.iterdir() if path.name != "phantoms"]


def test_resampling_changes_the_grid_and_keeps_the_anatomy(tmp_path):
    make_phantoms(tmp_path / "phantoms", 1, seed=0)
    dataset = read_dataset(tmp_path / "phantoms")
    own = load_case(dataset.cases[0], dataset.modalities)
    fine = load_case(dataset.cases[0], dataset.modalities, (4.0, 4.0, 4.0))
    expected = [round(n * s / 4.0) for n, s in zip(own.label.shape, own.spacing, strict=True)]
    assert fine.label.shape == tuple(expected)
    for class_id in range(1, len(LABELS)):
        volume = (own.label == class_id).sum() * np.prod(own.spacing)
        np.testing.assert_allclose((fine.label == class_id).sum() * 4.0**3, volume, rtol=0.1)
