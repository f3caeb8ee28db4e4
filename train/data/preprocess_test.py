import numpy as np
import pytest

from train.data.dataset import BadCasesError
from train.data.layouts import read_dataset
from train.data.phantoms import LABELS, make_phantoms
from train.data.preprocess import make_sample, read_samples
from unetr_flax import Preprocessing
from unetr_flax.imaging.stored_voxels import StoredVoxels
from unetr_flax.imaging.volume import Volume

SHAPE = (9, 7, 6)
SPACING = (1.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])


@pytest.fixture
def dataset(tmp_path):
    make_phantoms(tmp_path / "phantoms", 3, seed=0)
    return read_dataset(tmp_path / "phantoms")


def test_image_and_label_are_brought_to_the_same_grid():
    x = np.broadcast_to(np.arange(9)[:, None, None], SHAPE)
    labels = np.where(x < 4, 0, 3).astype(np.int32)
    # The ramp lies within the CT window, so it is not clipped.
    volume = Volume((20 * x[..., None] - 100).astype(np.float32), AFFINE)
    own = make_sample("case", volume, labels, Preprocessing.from_modalities(["CT"]))
    np.testing.assert_allclose(own.image[:, 3, 2, 0], (20 * np.arange(9) - 100 + 175) / 425)
    np.testing.assert_array_equal(own.label, labels)
    assert own.name == "case"
    assert own.spacing == SPACING
    preprocessing = Preprocessing.from_modalities(["CT"], spacing=(0.5, 2.0, 3.0))
    fine = make_sample("case", volume, labels, preprocessing)
    assert fine.image.shape == (18, 7, 6, 1)
    assert fine.spacing == (0.5, 2.0, 3.0)
    # Centers of the fine voxels, in coarse voxels.
    centers = (np.arange(18) + 0.5) / 2 - 0.5
    ramp = np.interp(centers, np.arange(9), own.image[:, 0, 0, 0])
    np.testing.assert_allclose(fine.image[:, 3, 2, 0], ramp, atol=1e-5)
    np.testing.assert_array_equal(fine.label[:, 3, 2], np.where(centers < 3.5, 0, 3))


def test_labels_are_cropped_with_the_foreground():
    array = np.zeros((*SHAPE, 1), np.float32)
    array[3:5, 1:6, 2:4] = 100
    labels = (array[..., 0] > 0).astype(np.int32)
    array[3, 1, 2] = 120
    preprocessing = Preprocessing.from_modalities(["CT"], crop_foreground=True)
    sample = make_sample("case", Volume(array, AFFINE), labels, preprocessing)
    assert sample.image.shape == (2, 5, 2, 1)
    np.testing.assert_array_equal(sample.label, np.ones((2, 5, 2)))


def test_background_is_the_lowest_intensity_and_foreground_is_labeled():
    array = np.random.default_rng(0).gamma(3.0, 60.0, (*SHAPE, 2)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.int32)
    preprocessing = Preprocessing.from_modalities(["T1", "T2"])
    sample = make_sample("case", Volume(array, AFFINE), labels, preprocessing)
    np.testing.assert_array_equal(sample.background, sample.image.min((0, 1, 2)))
    np.testing.assert_array_equal(sample.label.ravel()[sample.foreground] > 0, True)
    assert len(sample.foreground) == (labels > 0).sum()


def test_resampling_changes_the_grid_and_keeps_the_anatomy(dataset):
    own, fine = (
        read_samples(dataset, dataset.cases[:1], Preprocessing.from_modalities(["CT"], spacing=s))
        for s in (None, (4.0, 4.0, 4.0))
    )
    (own,), (fine,) = own, fine
    expected = [round(n * s / 4.0) for n, s in zip(own.label.shape, own.spacing, strict=True)]
    assert fine.label.shape == tuple(expected)
    for class_id in range(1, len(LABELS)):
        volume = (own.label == class_id).sum() * np.prod(own.spacing)
        np.testing.assert_allclose((fine.label == class_id).sum() * 4.0**3, volume, rtol=0.1)


def test_training_cases_become_samples_from_the_only_read_of_each_file(dataset, monkeypatch):
    read, normalized = [], []
    load, normalize = StoredVoxels.read, Preprocessing.normalize
    monkeypatch.setattr(StoredVoxels, "read", lambda file: read.append(file.path) or load(file))
    monkeypatch.setattr(
        Preprocessing,
        "normalize",
        lambda self, volume: normalized.append(volume) or normalize(self, volume),
    )
    train_cases = dataset.cases[::2]
    done = []
    samples = read_samples(dataset, train_cases, Preprocessing.from_modalities(["CT"]), done.append)
    assert [sample.name for sample in samples] == [case.name for case in train_cases]
    assert sorted(read) == sorted(p for case in dataset.cases for p in case.files)
    assert len(normalized) == len(train_cases)
    assert done == [1, 2, 3]


def test_bad_validation_cases_are_found_too(dataset):
    dataset.cases[1].images[0].write_bytes(b"")
    with pytest.raises(BadCasesError, match=r"phantom_001\.nii\.gz: not a readable NIfTI file"):
        read_samples(dataset, dataset.cases[::2], Preprocessing.from_modalities(["CT"]))


def test_other_processes_read_their_training_cases_after_the_check(dataset, monkeypatch):
    checks, read = [], []
    load = StoredVoxels.read
    monkeypatch.setattr(StoredVoxels, "read", lambda file: read.append(file.path) or load(file))
    monkeypatch.setattr("train.data.preprocess.is_main", lambda: False)
    monkeypatch.setattr("train.data.preprocess.run_on_main", checks.append)
    (sample,) = read_samples(dataset, dataset.cases[1:2], Preprocessing.from_modalities(["CT"]))
    assert sample.name == dataset.cases[1].name
    assert len(checks) == 1
    assert sorted(read) == sorted(dataset.cases[1].files)
