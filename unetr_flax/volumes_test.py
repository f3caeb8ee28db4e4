import gzip
import subprocess
import sys

import numpy as np
import pytest

from unetr_flax.volumes import (
    VolumeError,
    normalise_ct,
    normalise_mri,
    read_labels,
    read_volume,
    write_labels,
)

nib = pytest.importorskip("nibabel")

SHAPE = (5, 6, 4)
ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SAL"]


def save(path, array, codes="RAS", spacing=(0.8, 0.9, 5.0), oblique=False):
    """Writes an array that is RAS in a file with another orientation."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-10, 20, 30)
    if oblique:
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
        affine = turn @ affine
    image = nib.Nifti1Image(array, affine)
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(transform), path)
    return affine


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_reads_as_the_same_volume(tmp_path, codes, oblique):
    array = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    affine = save(tmp_path / "image.nii.gz", array, codes, oblique=oblique)
    volume = read_volume(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(volume.array, array[..., None].astype(np.float32))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, (0.8, 0.9, 5.0), rtol=1e-6)


def test_fourth_axis_is_channels_and_scaling_is_applied(tmp_path):
    array = np.random.default_rng(0).random((*SHAPE, 2)).astype(np.float32)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_data_dtype(np.int16)
    nib.save(image, tmp_path / "image.nii")
    volume = read_volume(tmp_path / "image.nii")
    assert volume.array.shape == (*SHAPE, 2)
    np.testing.assert_allclose(volume.array, array, atol=1e-4)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_labels_go_back_onto_the_original_grid(tmp_path, codes):
    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    save(tmp_path / "label.nii.gz", labels.astype(np.float32), codes)
    read, _ = read_labels(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == np.int32
    write_labels(tmp_path / "out.nii.gz", read, like=tmp_path / "label.nii.gz")
    original, written = nib.load(tmp_path / "label.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(written.affine, original.affine)
    assert written.get_data_dtype() == np.uint8


def test_labels_of_another_grid_are_not_written(tmp_path):
    save(tmp_path / "label.nii.gz", np.zeros(SHAPE, np.uint8), "PIR")
    with pytest.raises(VolumeError, match=r"grid \(5, 6, 4\), labels have \(4, 5, 6\)"):
        write_labels(tmp_path / "out.nii.gz", np.zeros((4, 5, 6), int), tmp_path / "label.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


def _missing(path):
    pass


def _truncated(path):
    save(path, np.random.default_rng(0).random((40, 40, 40)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:5000])


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_bytes(gzip.compress(b"this is not an image" * 100))


def _plane(path):
    nib.save(nib.Nifti1Image(np.zeros((5, 6), np.float32), np.eye(4)), path)


def _nan(path):
    array = np.zeros(SHAPE, np.float32)
    array[0, 0, :2] = np.nan
    save(path, array)


@pytest.mark.parametrize("reader", [read_volume, read_labels])
@pytest.mark.parametrize("damage", [_missing, _truncated, _empty, _text, _plane, _nan])
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, damage, reader):
    path = tmp_path / "image.nii.gz"
    damage(path)
    with pytest.raises(VolumeError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_labels_must_be_whole_numbers(tmp_path):
    save(tmp_path / "label.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(VolumeError, match="whole numbers"):
        read_labels(tmp_path / "label.nii.gz")


def test_ct_window():
    hu = np.array([-1000.0, -175.0, 37.5, 250.0, 3000.0])
    np.testing.assert_allclose(normalise_ct(hu), [0, 0, 0.5, 1, 1])


def test_mri_is_normalised_by_its_body_whatever_its_unit():
    rng = np.random.default_rng(0)
    image = rng.gamma(4.0, 100.0, (10, 12, 8, 2))
    image[:5] = 0
    image[7, 0, 0] = 1e9
    normalised = normalise_mri(image)
    body = normalised[5:].reshape(-1, 2)
    np.testing.assert_allclose(body.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(body.std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(normalise_mri(image * 1000), normalised, atol=1e-4)
    assert np.isfinite(normalise_mri(np.zeros((3, 3, 3, 1)))).all()


def test_without_nibabel_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['nibabel'] = None\n"
        "from unetr_flax.volumes import VolumeError, read_volume\n"
        "try: read_volume('x.nii')\n"
        "except VolumeError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "NIfTI files need nibabel: pip install 'unetr-flax[volumes]'\n"
