import itertools

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from unetr_flax import UNETR, Preprocessing, Segmenter, sliding_window_inference
from unetr_flax.imaging import Volume, VolumeError, Window, read_labels
from unetr_flax.inference.predictor import Predictor, Weights
from unetr_flax.inference.regions import Regions
from unetr_flax.inference.testing import brighter_than_half, fake_predictor, tiny_config
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import CheckpointError, load_pretrained, save_pretrained

RNG = np.random.default_rng(0)
CT = Preprocessing(
    ("CT",),
    (Window(-100, 100),),
    labels=("background", "bright"),
    spacing=(1.5, 1.0, 2.0),
    crop_foreground=True,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders of a small model with different weights."""
    cfg = tiny_config(3)
    folders = []
    for seed in range(2):
        rng = np.random.default_rng(seed)

        def draw(leaf, rng=rng):
            # Variances must not be negative.
            return rng.uniform(0.2 if leaf.ndim == 1 else -0.5, 0.8, leaf.shape).astype(np.float32)

        variables = jax.tree.map(draw, abstract_variables(UNETR(cfg)))
        folders.append(tmp_path_factory.mktemp("models") / str(seed))
        preprocessing = Preprocessing(("CT",), (Window(-100, 100),), spacing=(1.5, 1.0, 2.0))
        save_pretrained(folders[-1], cfg, variables, preprocessing=preprocessing)
    return cfg, folders


def scan(shape, spacing=(1.0, 1.2, 2.5)):
    return Volume((100 * RNG.normal(size=(*shape, 1))).astype(np.float32), np.diag([*spacing, 1.0]))


def test_a_model_segments_scans_of_any_size_by_one_program(models, compiled):
    cfg, folders = models
    segmenter = Segmenter.from_pretrained(folders[0], overlap=0.5)
    first = segmenter.segment(scan((20, 13, 17)), probabilities=True)
    volume = scan((9, 20, 30))
    compiled.clear()
    counts = []
    second = segmenter.segment(volume, progress=lambda *c: counts.append(c))
    assert not compiled
    assert counts[-1][0] == counts[-1][1] > 1

    # The same, step by step.
    image, grid = segmenter.preprocessing.apply(volume)
    _, weights = load_pretrained(folders[0])
    missing = [max(r - s, 0) for s, r in zip(grid.shape, cfg.img_size, strict=True)]
    pads = [(m // 2, m - m // 2) for m in missing]
    padded = np.pad(image, [*pads, (0, 0)], constant_values=image.min())
    predict = jax.jit(lambda windows: UNETR(cfg).apply(weights, windows))
    logits = sliding_window_inference(padded[None], cfg.img_size, predict, 0.5, "gaussian")[0]
    inside = tuple(slice(a, n - b) for (a, b), n in zip(pads, padded.shape, strict=False))
    restored = grid.restore_logits(logits[inside])
    ordered = np.sort(restored, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(second.labels[clear], restored.argmax(-1)[clear])
    assert second.probabilities is None
    np.testing.assert_allclose(first.probabilities.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(first.labels, first.probabilities.argmax(-1))


def test_models_and_flips_are_averaged(models):
    cfg, folders = models
    weights = [Weights(*load_pretrained(folder)) for folder in folders]
    predictor = Predictor(weights, flips=(0, 2))
    shape = (predictor.batch_size, *cfg.img_size, 1)
    windows = RNG.normal(size=shape).astype(np.float32)
    found = predictor(windows)
    apply = jax.jit(UNETR(cfg).apply)
    expected = []
    for one, axes in itertools.product(weights, [(), (1,), (3,), (1, 3)]):
        logits = apply(one.variables, jnp.flip(windows, axes))
        expected.append(jnp.flip(jax.nn.softmax(logits, axis=-1), axes))
    np.testing.assert_allclose(jax.nn.softmax(found, axis=-1), np.mean(expected, 0), rtol=1e-5)


def test_a_flipped_or_permuted_copy_gives_the_flipped_or_permuted_labels(tmp_path):
    def place_dependent(windows):
        ramp = np.linspace(0, 0.3, windows[0].size).reshape(windows.shape[1:])
        return brighter_than_half(windows + ramp)

    segmenter = Segmenter(fake_predictor(place_dependent), CT)
    array = RNG.integers(-150, 150, (9, 8, 7)).astype(np.int16)
    affine = np.array([[1.0, 0.1, 0, 5], [0, 1.2, 0.2, -3], [0.1, 0, 2.5, 9], [0, 0, 0, 1]])
    original = nib.Nifti1Image(array, affine)
    nib.save(original, tmp_path / "a.nii.gz")
    segmenter.segment(tmp_path / "a.nii.gz").save(tmp_path / "a_labels.nii.gz")
    expected = np.asarray(nib.load(tmp_path / "a_labels.nii.gz").dataobj)
    assert 0 < expected.mean() < 1
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            orientation = np.stack([axes, signs], axis=1)
            nib.save(original.as_reoriented(orientation), tmp_path / "b.nii")
            segmenter.segment(tmp_path / "b.nii").save(tmp_path / "c.nii")
            changed = nib.load(tmp_path / "c.nii")
            np.testing.assert_array_equal(
                np.asarray(changed.dataobj), nib.apply_orientation(expected, orientation)
            )
            np.testing.assert_array_equal(changed.affine, nib.load(tmp_path / "b.nii").affine)


def test_scans_in_memory_have_no_file_to_be_saved_like(tmp_path):
    segmentation = Segmenter(fake_predictor(brighter_than_half), CT).segment(scan((9, 8, 7)))
    assert segmentation.names == {0: "background", 1: "bright"}
    with pytest.raises(VolumeError, match="the scan came as an array"):
        segmentation.save(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_scans_in_memory_must_be_finite_as_files_must(value):
    volume = scan((9, 8, 7))
    volume.array[2, 3, 4] = volume.array[8, 7, 6] = value
    segmenter = Segmenter(fake_predictor(brighter_than_half), CT)
    with pytest.raises(ValueError, match=r"^volume: 2 voxels are NaN or infinite, all must be "):
        segmenter.segment(volume)


def test_an_array_for_probabilities_may_hold_anything():
    volume = scan((20, 18, 16))
    volume.array[:6] = -1000
    segmenter = Segmenter(fake_predictor(brighter_than_half), CT)
    expected = segmenter.segment(volume, probabilities=True).probabilities
    found = np.full((20, 18, 16, 2), 7, np.float64)
    assert segmenter.segment(volume, probabilities=found).probabilities is found
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[:6], np.broadcast_to([1, 0], (6, 18, 16, 2)))


def test_outside_the_foreground_all_is_background():
    volume = scan((20, 18, 16))
    volume.array[:6] = -1000
    volume.array[..., :5, :] = -1000
    labels = Segmenter(fake_predictor(lambda w: -brighter_than_half(w)), CT).segment(volume).labels
    assert not labels[:6].any()
    assert not labels[..., :5].any()
    assert labels.mean() > 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 2}, "preprocessing: 1 modalities of 3D scans, the model takes 2 channels"),
        ({"num_classes": 3}, "preprocessing: 2 labels, the model has 3"),
        ({"num_classes": 1}, "regions: none, but the model has one output, .* --regions NAME of"),
        ({"roi": (4, 4)}, "takes 1 channels of 2 axes"),
    ],
)
def test_preprocessing_of_another_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(fake_predictor(brighter_than_half, **change), CT)


def test_regions_are_named_instead_of_labels():
    def bright(windows):
        return windows - 0.5

    regions = Regions.from_ids(["bright"], [[3]])
    one = Segmenter(fake_predictor(bright, num_classes=1), CT, regions=regions)
    assert one.names == {0: "background", 3: "bright"}
    found = one.segment(volume := scan((9, 8, 7)))
    classes = Segmenter(fake_predictor(brighter_than_half), CT).segment(volume)
    np.testing.assert_array_equal(found.labels, 3 * classes.labels)
    with pytest.raises(ValueError, match=r"^regions bright: must be 2, one for each output"):
        Segmenter(fake_predictor(brighter_than_half), CT, regions=regions)


def test_folders_that_do_not_fit_together_are_named(models, tmp_path):
    cfg, folders = models
    _, variables = load_pretrained(folders[0])
    save_pretrained(tmp_path / "none", cfg, variables)
    with pytest.raises(CheckpointError, match="none: holds no preprocessing"):
        Segmenter.from_pretrained(tmp_path / "none")
    other = Preprocessing(("CT",), (Window(-90, 100),), spacing=(1.5, 1.0, 2.0))
    save_pretrained(tmp_path / "other", cfg, variables, preprocessing=other)
    with pytest.raises(CheckpointError, match=r"other: its preprocessing differs .* in intensity"):
        Segmenter.from_pretrained([folders[0], tmp_path / "other"])
    with pytest.raises(ValueError, match=r"flips=\[3\]: must be axes 0 to 2"):
        Segmenter.from_pretrained(folders[0], flips=[3])
    with pytest.raises(ValueError, match="overlap=1: must be in"):
        Segmenter(fake_predictor(brighter_than_half), CT, overlap=1)


def test_labels_are_read_back(tmp_path):
    volume = scan((9, 8, 7))
    nib.save(nib.Nifti1Image(volume.array[..., 0], volume.affine), tmp_path / "scan.nii.gz")
    segmentation = Segmenter(fake_predictor(brighter_than_half), CT).segment(
        tmp_path / "scan.nii.gz"
    )
    segmentation.save(tmp_path / "labels.nii.gz")
    labels, affine = read_labels(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(labels, segmentation.labels)
    np.testing.assert_allclose(affine, volume.affine)
