import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest

from train.data.cases import read_case
from train.data.dataset import BadCasesError, DataError
from train.data.layouts import read_dataset
from train.data.testing import SHAPE, describe, overwrite, write, write_decathlon


def problems(dataset):
    """Lists what is wrong with the files of a data set, one line each."""
    lines = []
    for case in dataset.cases:
        try:
            read_case(dataset, case)
        except BadCasesError as error:
            lines += str(error).splitlines()
    return lines


@pytest.fixture
def folder(tmp_path):
    return write_decathlon(tmp_path)


def _remove_image(folder):
    (folder / "imagesTr/case_1.nii.gz").unlink()
    return "imagesTr/case_1.nii.gz: no such file"


def _remove_label(folder):
    (folder / "labelsTr/case_1.nii.gz").unlink()
    return "labelsTr/case_1.nii.gz: no such file"


def _truncate(folder):
    path = folder / "imagesTr/case_1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return "imagesTr/case_1.nii.gz: not a readable NIfTI file"


def _wrong_checksum(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    return "labelsTr/case_1.nii.gz: not a readable NIfTI file"


def _nan(folder):
    def change(array):
        array[0, 0, 0] = np.nan
        return array

    overwrite(folder / "imagesTr/case_1.nii.gz", change)
    return "imagesTr/case_1.nii.gz: 1 voxels are NaN or infinite"


def _other_shape(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a[:5])
    return "labelsTr/case_1.nii.gz: shape (5, 5, 4), its image has (6, 5, 4)"


def _other_affine(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    affine = np.eye(4)
    affine[0, 3] = 0.5
    write(path, np.asarray(nib.load(path).dataobj), affine)
    return (
        "labelsTr/case_1.nii.gz: its grid is off by 0.5 voxels at a corner from its image's, must "
        "be within 0.1; --allow-grid-mismatch takes it voxel by voxel"
    )


def _unknown_label(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: np.where(a == 2, 7, a))
    return "labelsTr/case_1.nii.gz: label ids [7], declared are 0 to 2"


def _negative_label(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a.astype(np.int16) - 1)
    return "labelsTr/case_1.nii.gz: label ids [-1]"


def _fraction(folder):
    overwrite(folder / "labelsTr/case_1.nii.gz", lambda a: a.astype(np.float32) + 0.25)
    return "labelsTr/case_1.nii.gz: labels must be whole numbers"


def _channels(folder):
    overwrite(folder / "imagesTr/case_1.nii.gz", lambda a: np.stack([a, a], -1))
    return "imagesTr/case_1.nii.gz: 2 channels, the data set declares 1: MRI"


@pytest.mark.parametrize(
    "damage",
    [
        _remove_image,
        _remove_label,
        _truncate,
        _wrong_checksum,
        _nan,
        _other_shape,
        _other_affine,
        _unknown_label,
        _negative_label,
        _fraction,
        _channels,
    ],
)
def test_every_bad_file_is_one_line(folder, damage):
    expected = damage(folder)
    (problem,) = problems(read_dataset(folder))
    assert problem.startswith(f"{folder}/{expected}")


def test_all_bad_files_are_told_at_once(folder):
    for i in range(3):
        (folder / f"labelsTr/case_{i}.nii.gz").unlink()
    assert len(problems(read_dataset(folder))) == 3


@pytest.mark.parametrize(("shift", "count"), [(0.09, 0), (0.11, 1)])
def test_corners_may_be_off_by_a_tenth_of_a_voxel(folder, shift, count):
    path = folder / "labelsTr/case_1.nii.gz"
    affine = np.eye(4)
    # A larger spacing moves the far face by the sum over all voxels.
    affine[1, 1] += shift / (SHAPE[1] - 0.5)
    write(path, np.asarray(nib.load(path).dataobj), affine)
    assert len(problems(read_dataset(folder))) == count


def test_another_grid_may_be_allowed(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    stored = np.asarray(nib.load(path).dataobj)
    # An affine that says nothing, as some tools write it.
    write(path, stored, np.diag([-3.0, 2.0, 1.0, 1.0]))
    dataset = dataclasses.replace(read_dataset(folder), allow_grid_mismatch=True)
    _, targets = read_case(dataset, dataset.cases[1])
    np.testing.assert_array_equal(targets, stored)
    overwrite(path, lambda a: a[:5])
    assert problems(dataset) == [f"{path}: shape (5, 5, 4), its image has (6, 5, 4)"]


def test_the_label_map_follows_the_orientation_of_its_image(folder):
    """Two affines that differ by rounding may lie on both sides of 45 degrees."""
    turned = []
    for degrees in (44.999, 45.001):
        a = np.radians(degrees)
        affine = np.eye(4)
        affine[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
        turned.append(affine)
    image, label = (folder / f"{name}/case_1.nii.gz" for name in ("imagesTr", "labelsTr"))
    assert (nib.io_orientation(turned[0]) != nib.io_orientation(turned[1])).any()
    stored = [np.asarray(nib.load(path).dataobj) for path in (image, label)]
    write(image, stored[0], turned[0])
    write(label, stored[1], turned[1])
    dataset = read_dataset(folder)
    volume, labels = read_case(dataset, dataset.cases[1])
    # What was together in the files is together on the canonical grid.
    pairs = {(float(i), int(n)) for i, n in zip(stored[0].ravel(), stored[1].ravel(), strict=True)}
    found = zip(volume.array.ravel(), labels.ravel(), strict=True)
    assert {(float(i), int(n)) for i, n in found} == pairs


def test_image_and_label_of_one_grid_may_be_stored_in_different_orders(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    label = nib.load(path)
    label = nib.Nifti1Image(np.asarray(label.dataobj).copy(), label.affine)
    nib.save(label.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), path)
    assert nib.load(path).shape != (6, 5, 4)
    assert problems(read_dataset(folder)) == []


def test_masks_with_a_channel_per_label_are_recognized(folder):
    for i in range(3):
        overwrite(
            folder / f"labelsTr/case_{i}.nii.gz",
            lambda a: np.stack([a > 0, a > 1], -1).astype(np.uint8),
        )
    dataset = read_dataset(folder)
    assert (dataset.target, dataset.num_outputs) == ("masks", 2)
    _, targets = read_case(dataset, dataset.cases[0])
    assert np.unique(targets).tolist() == [0, 1, 3]
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    describe(folder, labels=labels | {"3": "more"})
    with pytest.raises(DataError, match=r"case_0\.nii\.gz: 2 channels; .* each of the 3 labels"):
        read_dataset(folder)


def test_masks_stored_with_slope_and_intercept(folder):
    path = folder / "labelsTr/case_1.nii.gz"
    stored = np.asarray(nib.load(path).dataobj)
    image = nib.Nifti1Image(stored.astype(np.float32), np.eye(4))
    image.set_data_dtype(np.int16)
    nib.save(image, path)
    assert nib.load(path).dataobj.slope != 1
    dataset = read_dataset(folder)
    _, targets = read_case(dataset, dataset.cases[1])
    np.testing.assert_array_equal(targets, stored)
