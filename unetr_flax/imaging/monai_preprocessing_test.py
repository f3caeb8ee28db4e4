"""Preprocessing beside MONAI's transforms, from the same files."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from unetr_flax.imaging.intensity import Window
from unetr_flax.imaging.nifti import read_labels, read_volume
from unetr_flax.imaging.preprocessing import Preprocessing

# MONAI calls functions of NumPy and PyTorch that these deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = ["image", "label"]
# Differences of float32 interpolation; normalized intensities are from 0 to 1.
TOLERANCE = 2e-6
# The body has this many voxels of these mm, so that its extent is whole in each of the spacings.
BODY, SPACING = (21, 20, 6), (0.5, 0.9, 2.0)
SPACINGS = [None, (1.5, 1.5, 1.5), (0.5, 1.8, 2.0)]


@pytest.fixture
def files(tmp_path):
    """Writes a scan whose axes run to the left, back and head, with air around the body."""
    rng = np.random.default_rng(0)
    image = np.full([n + 5 for n in BODY], -1000, np.float32)
    label = np.zeros(image.shape, np.uint8)
    inside = tuple(slice(2, 2 + n) for n in BODY)
    # Above the window's lower end at the faces of the body, so that both find the same box.
    image[inside] = rng.uniform(-150, 300, BODY)
    label[inside] = rng.integers(0, 3, BODY)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = 10, 20, -30
    for name, array in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    return {name: tmp_path / f"{name}.nii.gz" for name in KEYS}


def theirs(files, spacing):
    # Imported here: it takes seconds, which collecting the tests need not wait for.
    transforms = pytest.importorskip("monai.transforms")
    steps = [
        transforms.LoadImaged(KEYS),
        transforms.EnsureChannelFirstd(KEYS),
        transforms.Orientationd(KEYS, "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        transforms.ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
        transforms.CropForegroundd(KEYS, "image", allow_smaller=True),
    ]
    if spacing is not None:
        # MONAI's default keeps the centers of the first voxels; with this option the extent is
        # kept, as here and in nnU-Net.
        modes = ("bilinear", "nearest")
        steps.append(transforms.Spacingd(KEYS, spacing, mode=modes, scale_extent=True))
    result = transforms.Compose(steps)({name: str(path) for name, path in files.items()})
    return tuple(np.asarray(result[name])[0] for name in KEYS)


def ours(files, spacing):
    preprocessing = Preprocessing(("CT",), (Window(-175, 250),), (), "RAS", spacing, True)
    image, grid = preprocessing.apply(read_volume(files["image"]))
    return image[..., 0], grid.sample_labels(read_labels(files["label"])[0])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_orientation_intensity_crop_and_spacing_are_those_of_monai(files, spacing):
    (image, label), (expected, expected_label) = ours(files, spacing), theirs(files, spacing)
    assert image.shape == expected.shape
    np.testing.assert_allclose(image, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(label, expected_label)


def test_a_real_scan_is_prepared_as_by_monai():
    folder = os.environ.get("UNETR_CT")
    if folder is None:
        pytest.skip("UNETR_CT does not name a folder with a scan ct.nii.gz and its label.nii.gz")
    files = {"image": Path(folder) / "ct.nii.gz", "label": Path(folder) / "label.nii.gz"}
    (image, label), (expected, expected_label) = ours(files, None), theirs(files, None)
    np.testing.assert_allclose(image, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(label, expected_label)
