import types

import flax.linen as nn
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from train.data.dataset import Case, Dataset
from train.validate import Evaluator
from unetr_flax import Preprocessing
from unetr_flax.imaging.stored_voxels import StoredVoxels
from unetr_flax.inference.predictor import make_predict

WINDOW = (16, 8, 8)
NOBODY = types.SimpleNamespace(requested=False)


class Threshold(nn.Module):
    """A stand-in for a model: class 1 where the image is above 0.5, class 0 elsewhere."""

    config: types.SimpleNamespace

    def __call__(self, x):
        return jnp.concatenate([0.5 - x, x - 0.5], axis=-1)


@pytest.fixture
def cases(tmp_path):
    """Writes volumes larger and smaller than the window, whose bright half is class 1."""
    cases = []
    for i, shape in enumerate([(21, 9, 13), (6, 12, 5), (17, 8, 8)]):
        label = np.zeros(shape, np.uint8)
        label[:, : shape[1] // 2 + i] = 1
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        case = Case(f"c{i}", (tmp_path / f"image{i}.nii.gz",), tmp_path / f"label{i}.nii.gz")
        # The two intensities lie below and above the CT window.
        nib.save(nib.Nifti1Image(label.astype(np.int16) * 3000 - 1500, affine), case.images[0])
        nib.save(nib.Nifti1Image(label, affine), case.label)
        cases.append(case)
    return cases


def evaluator(cases, modality="CT", predict=None, **options):
    config = types.SimpleNamespace(img_size=WINDOW, in_channels=1, out_channels=2)
    preprocessing = Preprocessing.from_modalities([modality], **options)
    dataset = Dataset("Test", (modality,), ("background", "bright"), tuple(cases))
    predict = predict or make_predict(Threshold(config))
    return Evaluator(predict, config, dataset, cases, preprocessing, overlap=0.25)


def state():
    return types.SimpleNamespace(variables={})


def test_segments_whole_volumes_on_their_own_grid(cases):
    pairs = list(evaluator(cases).segment({}, cases))
    assert [sample.name for sample, _ in pairs] == ["c0", "c1", "c2"]
    for sample, prediction in pairs:
        assert prediction.shape == sample.label.shape
        np.testing.assert_array_equal(prediction, sample.label)
    scores = evaluator(cases)(state(), NOBODY)
    np.testing.assert_array_equal(scores.per_class, [1, 1])
    assert scores.mean_foreground == 1


def test_surfaces_are_judged_and_processes_merge_their_cases(cases, monkeypatch):
    whole = evaluator(cases)(state(), NOBODY)
    assert whole.cases.keys() == {"c0", "c1", "c2"}
    assert whole.mean_over_labels("hd95") == 0
    assert whole.mean_over_labels("surface_dice") == 1

    # Each of two processes has its share of the cases, and the sums are those of both.
    shares = []
    monkeypatch.setattr("train.validate.jax.process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr("train.validate.jax.process_index", lambda process=process: process)
        monkeypatch.setattr("train.validate.process_sum", lambda x: shares.append(x) or x)
        evaluator(cases)(state(), NOBODY)
    _, counts_0, rows_0, _, counts_1, rows_1 = shares
    sums = iter([np.zeros((), np.int32), counts_0 + counts_1, rows_0 + rows_1])
    monkeypatch.setattr("train.validate.process_sum", lambda _: next(sums))
    merged = evaluator(cases)(state(), NOBODY)
    assert merged.cases == whole.cases
    np.testing.assert_array_equal(merged.per_class, whole.per_class)


def test_resampling_is_undone(cases):
    pairs = list(evaluator(cases, spacing=(1.5, 1.0, 2.0)).segment({}, cases))
    for sample, prediction in pairs:
        assert prediction.shape == sample.label.shape
        assert sample.spacing == (1, 2, 3)
        # Only voxels at the edge between the classes may change.
        assert (prediction == sample.label).mean() > 0.95
    assert evaluator(cases, spacing=(1.5, 1.0, 2.0))(state(), NOBODY).mean_foreground > 0.95


def test_cropping_to_the_foreground_is_undone(cases):
    for sample, prediction in evaluator(cases, crop_foreground=True).segment({}, cases):
        np.testing.assert_array_equal(prediction, sample.label)
    pairs = evaluator(cases, crop_foreground=True, spacing=(1.5, 1.0, 2.0)).segment({}, cases)
    for sample, prediction in pairs:
        assert (prediction == sample.label).mean() > 0.95


def test_a_case_is_read_and_normalized_once(cases, monkeypatch):
    read, normalized = [], []
    load, normalize = StoredVoxels.read, Preprocessing.normalize
    monkeypatch.setattr(StoredVoxels, "read", lambda file: read.append(file.path) or load(file))
    monkeypatch.setattr(
        Preprocessing,
        "normalize",
        lambda self, volume: normalized.append(volume) or normalize(self, volume),
    )
    evaluator(cases, spacing=(1.5, 1.0, 2.0))(state(), NOBODY)
    assert sorted(read) == sorted(path for case in cases for path in case.files)
    assert len(normalized) == len(cases)


def test_what_lies_outside_a_small_volume_looks_like_background(cases):
    seen = []

    def predict(variables, x):
        # The scan is one window; what else is in the batch fills it up.
        seen.append(x[:1])
        return np.concatenate([x, x], axis=-1)

    ((sample, _),) = evaluator(cases, modality="MRI", predict=predict).segment({}, cases[1:2])
    lowest = sample.image.min()
    assert lowest < 0
    assert min(x.min() for x in seen) == lowest
    # The scan fills 6 of 16 and 5 of 8 voxels; the rest has the lowest intensity, not zero.
    assert all(np.isin(x, [lowest, sample.image.max()]).all() for x in seen)


@pytest.mark.parametrize("windows", [1, 3])
def test_so_many_windows_are_segmented_at_once(cases, windows):
    seen = []

    def predict(variables, x):
        seen.append(len(x))
        return np.concatenate([x, x], axis=-1)

    whole = evaluator(cases, predict=predict)
    few = Evaluator(
        predict, whole._config, whole._dataset, cases, whole._preprocessing, 0.25, windows
    )
    list(few.segment({}, cases))
    assert set(seen) == {windows}


def test_an_interrupt_ends_it_without_a_result(cases):
    assert evaluator(cases)(state(), types.SimpleNamespace(requested=True)) is None
