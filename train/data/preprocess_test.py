import nibabel as nib
import numpy as np
import pytest

from train.data.decathlon import Case, read_dataset
from train.data.phantoms import LABELS, make_phantoms
from train.data.preprocess import load_case
from unetr_flax.imaging.nifti import normalize_ct, normalize_mri

SHAPE = (9, 7, 6)
SPACING = (1.0, 2.0, 3.0)


@pytest.fixture
def write_case(tmp_path):
    """Writes an image [X, Y, Z, C] and a label that are RAS as files that are PIL."""

    def write(image, label):
        affine = np.diag([*SPACING, 1.0])
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt("PIL")
        )
        for name, array in (("image", image), ("label", label)):
            file = nib.Nifti1Image(array, affine).as_reoriented(turn)
            nib.save(file, tmp_path / f"{name}.nii.gz")
        return Case("case", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")

    return write


def test_each_channel_is_normalized_as_its_modality_asks(write_case):
    rng = np.random.default_rng(0)
    image = rng.gamma(3.0, 60.0, (*SHAPE, 3)).astype(np.float32)
    label = rng.integers(0, 3, SHAPE).astype(np.uint8)
    sample = load_case(write_case(image, label), ("T2", "ct ", "ADC"))
    expected = [normalize_mri(image[..., :1]), normalize_ct(image[..., 1:2])]
    expected = np.concatenate([*expected, normalize_mri(image[..., 2:])], axis=-1)
    np.testing.assert_allclose(sample.image, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sample.label, label)
    assert sample.image.dtype == np.float32
    assert sample.label.dtype == np.int32
    np.testing.assert_allclose(sample.spacing, SPACING)


def test_image_is_resampled_linearly_and_label_to_the_nearest(write_case):
    x = np.broadcast_to(np.arange(9.0)[:, None, None], SHAPE)
    label = np.where(x < 4, 0, 3).astype(np.uint8)
    # Within the window, so that it stays a ramp.
    case = write_case((20 * x[..., None] - 100).astype(np.float32), label)
    own = load_case(case, ("CT",))
    fine = load_case(case, ("CT",), (0.5, 2.0, 3.0))
    assert fine.image.shape == (18, 7, 6, 1)
    assert fine.spacing == (0.5, 2.0, 3.0)
    # Centers of the fine voxels, in coarse voxels.
    centers = (np.arange(18) + 0.5) / 2 - 0.5
    ramp = np.interp(centers, np.arange(9), own.image[:, 0, 0, 0])
    np.testing.assert_allclose(fine.image[:, 3, 2, 0], ramp, atol=1e-5)
    assert set(np.unique(fine.label)) == {0, 3}
    np.testing.assert_array_equal(fine.label[:, 3, 2], np.where(centers < 3.5, 0, 3))


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
