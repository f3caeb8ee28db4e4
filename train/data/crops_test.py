import numpy as np
import pytest

from train.data.crops import (
    RandomCrop,
    RandomRotatedCrop,
    default_crop,
    nnunet_crop,
    plain_crop,
    strong_crop,
)
from train.data.preprocess import Sample
from train.data.testing import sample

ROI = (8, 6, 10)


def rotated(roi_size, foreground_fraction=0.5, **options):
    """Makes a crop that is always rotated and zoomed."""
    return RandomRotatedCrop(roi_size, foreground_fraction, probability=1.0, **options)


def arrays(transform, case, rng):
    """Returns image and label after a transform, and checks that nothing else has changed."""
    changed = transform(case, rng)
    assert (changed.name, changed.spacing) == (case.name, case.spacing)
    assert changed.image.dtype == np.float32
    assert changed.label.dtype == np.int32
    return changed.image, changed.label


def blobs(shape=(16, 20, 14)):
    """Makes a smooth case, on which interpolation leaves image and label in agreement."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    label = ((x - 6) ** 2 + (y - 11) ** 2 + 2 * (z - 6) ** 2 < 30).astype(np.int32)
    return Sample("blob", label[..., None].astype(np.float32), label, (1.0, 1.0, 1.5))


def test_nnunet_s_crop_is_rotated_and_zoomed_further():
    crop = nnunet_crop([8, 6, 10])
    assert crop == RandomRotatedCrop(
        ROI, probability=pytest.approx(1 - 0.8**2), max_rotation=30.0, max_zoom=0.3
    )


@pytest.mark.parametrize("shape", [(20, 30, 15), (3, 4, 5), (8, 6, 10), (20, 4, 10)])
@pytest.mark.parametrize("foreground_fraction", [0.0, 1.0])
def test_a_crop_is_a_part_of_the_volume(shape, foreground_fraction):
    case = sample(shape)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, label = arrays(RandomCrop(ROI, foreground_fraction), case, rng)
        position = image[..., 1] - 1
        inside = np.zeros(ROI, bool)
        corner = [(roi - n) // 2 if n < roi else 0 for roi, n in zip(ROI, shape, strict=True)]
        inside[
            tuple(
                slice(max(c, 0), max(c, 0) + min(n, r))
                for c, n, r in zip(corner, shape, ROI, strict=True)
            )
        ] = True
        # Outside the volume is padding; within it, neighbors are the volume's neighbors.
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
    assert all(arrays(RandomCrop(ROI, 1.0), case, rng)[1].sum() == 1 for _ in range(10))
    found = sum(arrays(RandomCrop(ROI, 0.0), case, rng)[1].sum() for _ in range(50))
    assert found < 10


def test_image_and_label_stay_aligned_under_augmentation():
    case = blobs()
    agreements = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        image, label = arrays(rotated((16, 16, 16)), case, rng)
        agreements.append(((image[..., 0] > 0.5) == label).mean())
        assert label.sum() > 20
    assert min(agreements) > 0.98


def test_a_rotated_crop_has_another_label():
    case = blobs()
    roi_size = (16, 20, 14)
    plain = RandomCrop(roi_size, 0.0)(case, np.random.default_rng(0))
    changed = rotated(roi_size, 0.0)(case, np.random.default_rng(0))
    assert not np.array_equal(changed.label, plain.label)


def test_strong_crops_are_the_default_s_and_stronger():
    crop, usual = strong_crop(list(ROI)), default_crop(ROI)
    for name in ("probability", "max_rotation", "max_zoom"):
        assert getattr(crop, name) > getattr(usual, name)
    assert (crop.roi_size, crop.foreground_fraction) == (ROI, usual.foreground_fraction)


def test_without_augmentation_crops_are_cut_out_only():
    assert plain_crop([8, 6, 10]) == RandomCrop(ROI)


def test_the_default_draws_as_it_always_did():
    """Checks the order of draws, which must give the same crops for a seed in every version."""
    rng, ours = np.random.default_rng(4), np.random.default_rng(4)
    default_crop(ROI)(sample((20, 18, 22)), ours)
    rng.uniform(size=3)  # center
    if rng.random() < 0.5:
        rng.integers(np.count_nonzero(sample((20, 18, 22)).label))
    if rng.random() < 0.5:
        rng.uniform(size=3)  # angles
        rng.uniform()  # zoom
    assert rng.bit_generator.state == ours.bit_generator.state


def linear_map(seed, **options):
    """Returns the 3 x 3 map from mm of a crop, as large as the volume, to mm of the volume.

    The image is the position of each voxel, which linear interpolation leaves exact.
    """
    shape, spacing = (25, 21, 15), (1.0, 1.5, 3.0)
    axes = [(np.arange(n) - n // 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    image = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)
    case = Sample("ramps", image, np.zeros(shape, np.int32), spacing)
    image, _ = arrays(rotated(shape, 0.0, **options), case, np.random.default_rng(seed))
    middle = image[11:14, 9:12, 6:9]
    np.testing.assert_allclose(middle[1, 1, 1], 0, atol=1e-4)
    columns = [np.diff(middle, axis=i).mean((0, 1, 2)) / spacing[i] for i in range(3)]
    return np.stack(columns, axis=-1)


def test_geometry_is_a_rotation_of_millimeters_and_one_zoom_but_no_mirror():
    zooms, angles = [], []
    for seed in range(40):
        matrix = linear_map(seed)
        zoom = np.cbrt(np.linalg.det(matrix))
        rotation = matrix / zoom
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
        zooms.append(zoom)
        # The angles of a rotation about z, then y, then x.
        about_x = np.arctan2(-rotation[1, 2], rotation[2, 2])
        about_z = np.arctan2(-rotation[0, 1], rotation[0, 0])
        angles.append(np.degrees([about_x, np.arcsin(rotation[0, 2]), about_z]))
    assert 0.85 <= min(zooms) < 0.88
    assert 1.12 < max(zooms) <= 1.15
    angles = np.array(angles)
    np.testing.assert_array_less(np.abs(angles), 15.01)
    np.testing.assert_array_less(12, angles.max(0))
    np.testing.assert_array_less(angles.min(0), -12)


def test_without_rotation_and_zoom_nothing_moves():
    np.testing.assert_allclose(linear_map(0, max_rotation=0.0, max_zoom=0.0), np.eye(3), atol=1e-5)


def test_what_is_turned_out_of_the_volume_is_background_where_its_edge_is_not():
    image = np.ones((*ROI, 2), np.float32)
    image[3:5, 2:4, 4:6] = [-4.0, 0.0]
    case = Sample("edge", image, np.full(ROI, 2, np.int32), (1, 1, 1))
    crop = rotated(ROI, max_rotation=40.0)(case, np.random.default_rng(0))
    corners = (slice(None, None, ROI[0] - 1), slice(None, None, ROI[1] - 1), [0, ROI[2] - 1])
    outside = crop.label[corners] == 0
    assert outside.any()
    np.testing.assert_array_equal(
        crop.image[corners][outside], np.full((outside.sum(), 2), [-4, 0])
    )


def test_outside_of_the_volume_is_its_own_background():
    label = np.zeros((5, 5, 5), np.int32)
    label[2, 2, 2] = 1
    image = np.stack([label + 7.0, label - 3.0], axis=-1).astype(np.float32)
    case = Sample("small", image, label, (1, 1, 1))
    for transform in (RandomCrop((9, 8, 11), 0.0), rotated((9, 8, 11), 0.0)):
        image, label = arrays(transform, case, np.random.default_rng(0))
        np.testing.assert_array_equal(image[0, 0, 0], [7.0, -3.0])
        np.testing.assert_allclose(image.min(axis=(0, 1, 2)), [7.0, -3.0], rtol=1e-6)
        assert label[0, 0, 0] == 0


def test_labels_are_never_mixed():
    case = blobs()
    case = Sample("three", case.image, 3 * case.label, case.spacing)
    for seed in range(5):
        _, label = arrays(rotated((16, 16, 16)), case, np.random.default_rng(seed))
        assert set(np.unique(label)) == {0, 3}
