import nibabel as nib
import numpy as np
import pytest

from train.data import phantoms
from train.data.cases import read_case
from train.data.layouts import read_dataset
from train.data.phantoms import LABELS, make_phantom, make_phantoms
from train.data.preprocess import make_sample
from unetr_flax import Preprocessing


def test_phantoms_are_a_data_set_that_loads(tmp_path):
    make_phantoms(tmp_path / "phantoms", 3, seed=0)
    dataset = read_dataset(tmp_path / "phantoms")
    assert dataset.labels == LABELS
    preprocessing = Preprocessing.from_modalities(dataset.modalities)
    for i, case in enumerate(dataset.cases):
        loaded = make_sample(case.name, *read_case(dataset, case), preprocessing)
        _, label, _ = make_phantom(np.random.default_rng((0, i)))
        np.testing.assert_array_equal(loaded.label, label)
        assert set(np.unique(label)) == set(range(len(LABELS)))
        assert loaded.image.min() == 0
        assert loaded.image.max() == 1
        assert loaded.spacing[2] > 1.3 * loaded.spacing[0]
    with pytest.raises(FileExistsError):
        make_phantoms(tmp_path / "phantoms", 3, seed=0)
    assert not [path for path in tmp_path.iterdir() if path.name != "phantoms"]


def test_files_are_hounsfield_units_in_several_orientations(tmp_path):
    make_phantoms(tmp_path / "phantoms", 4, seed=0)
    dataset = read_dataset(tmp_path / "phantoms")
    images = [nib.load(case.images[0]) for case in dataset.cases]
    assert len({nib.aff2axcodes(image.affine) for image in images}) == 3
    assert len({image.shape for image in images}) > 1
    for image, case in zip(images, dataset.cases, strict=True):
        assert image.get_data_dtype() == np.int16
        assert nib.load(case.label).get_data_dtype() == np.uint8
        assert image.get_fdata().min() < -900 < 300 < image.get_fdata().max()


def test_intensity_alone_does_not_tell_the_spleen():
    image, label, _ = make_phantom(np.random.default_rng(0))
    liver, spleen = image[label == 1], image[label == 2]
    low, high = np.percentile(spleen, (5, 95))
    assert ((liver > low) & (liver < high)).mean() > 0.5


def test_liver_is_right_of_the_spleen_and_the_spine_behind():
    image, label, affine = make_phantom(np.random.default_rng(0))
    right, front, _ = (affine[:3, :3] @ np.argwhere(label == 1).mean(0)) + affine[:3, 3]
    assert right > 20
    assert (affine[:3, :3] @ np.argwhere(label == 2).mean(0) + affine[:3, 3])[0] < -20
    assert (affine[:3, :3] @ np.argwhere(image > 300).mean(0) + affine[:3, 3])[1] < front - 30


def test_seed_and_number_determine_a_phantom(tmp_path):
    def arrays(name, seed):
        make_phantoms(tmp_path / name, 2, seed)
        cases = read_dataset(tmp_path / name).cases
        return [np.asarray(nib.load(case.images[0]).dataobj) for case in cases]

    first, again, other = arrays("a", 1), arrays("b", 1), arrays("c", 2)
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z)
    assert not np.array_equal(first[0], first[1])


def test_nothing_is_left_of_a_data_set_that_could_not_be_written(tmp_path, monkeypatch):
    def save(image, path):
        assert not (tmp_path / "phantoms").exists()
        if path.name == "phantom_001.nii.gz":
            raise OSError("disk full")
        nib.save(image, path)

    monkeypatch.setattr(phantoms, "nib", _With(nib, save=save))
    with pytest.raises(OSError, match="disk full"):
        make_phantoms(tmp_path / "phantoms", 3, seed=0)
    assert not list(tmp_path.iterdir())


class _With:
    """A module with some of its functions replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)
