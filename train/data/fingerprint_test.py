import numpy as np
import pytest

from train.data.cases import read_case
from train.data.dataset import Case, Dataset
from train.data.fingerprint import take_fingerprint
from train.data.phantoms import LABELS, make_phantom
from train.data.preprocess import make_preprocessing
from train.data.testing import write


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Cases of a CT with a wide margin of air, and of the CT with an MRI."""
    folder = tmp_path_factory.mktemp("ct")
    rng = np.random.default_rng(0)
    image, label, affine = make_phantom(rng, ((60, 60, 20), (9.0, 9.0, 14.0)))
    image[..., 16:] = rng.integers(-1020, -980, (60, 60, 4))
    label[..., 16:] = 0
    mri = np.where(image > -500, image + 1000, 0).astype(np.int16)
    arrays = {"ct": image, "mri": mri, "label": label}
    paths = [write(folder / f"{name}.nii.gz", array, affine) for name, array in arrays.items()]
    return Case("a", (paths[0],), paths[2]), Case("b", tuple(paths[:2]), paths[2])


@pytest.mark.parametrize("window", [None, (-100.0, 250.0), (-2000.0, 0.0), (3000.0, 3100.0)])
@pytest.mark.parametrize("modalities", [("CT",), ("CT", "MRI"), ("MRI",)])
def test_the_box_is_that_of_preprocessing(scans, modalities, window):
    case = scans[len(modalities) - 1]
    dataset = Dataset("Phantom", modalities, LABELS, (case,))
    fingerprint = take_fingerprint(dataset, 1)
    volume, _ = read_case(dataset, case)
    used = window if "CT" in modalities else None
    preprocessing = make_preprocessing(
        modalities, (), spacing=None, window=used, crop_foreground=True
    )
    grid = preprocessing.grid(preprocessing.normalize(volume), volume.spacing)
    np.testing.assert_array_equal(fingerprint.boxes(window), [grid.shape])


def test_air_is_cut_off_whatever_its_noise(scans):
    dataset = Dataset("Phantom", ("CT",), LABELS, scans[:1])
    fingerprint = take_fingerprint(dataset, 1)
    assert fingerprint.filled((-100.0, 250.0)) < 0.5
    assert fingerprint.filled((-2000.0, 250.0)) == 1
