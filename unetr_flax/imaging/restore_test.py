import itertools

import numpy as np
import pytest

from unetr_flax.imaging import restore
from unetr_flax.imaging.model_grid import ModelGrid
from unetr_flax.imaging.restore import Restorer

RNG = np.random.default_rng(0)


def clear_of_ties(logits, gap=1e-4):
    ordered = np.sort(logits, axis=-1)
    return ordered[..., -1] - ordered[..., -2] > gap


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        ((7, 5, 6), (7, 5, 6)),  # the same
        ((9, 4, 3), (3, 8, 7)),  # coarser along one axis, finer along the others
        ((5, 4, 3), (1, 1, 1)),
        ((1, 1, 1), (5, 4, 3)),
        ((1, 9, 2), (2, 1, 9)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_labels_are_those_of_interpolated_logits(monkeypatch, box, shape, chunk):
    monkeypatch.setattr(restore, "CHUNK_NUMBERS", chunk)
    scan = tuple(length + 3 for length in box)
    grid = ModelGrid(scan, (2, 0, 1), box, shape, (1.0, 1.0, 1.0))
    logits = RNG.normal(size=(*shape, 4)).astype(np.float32)
    expected = grid.restore_logits(logits)
    # What the array held before goes, also where the model saw nothing.
    probabilities = np.full((*scan, 4), np.nan, np.float32)
    plain, soft = Restorer(grid, 4), Restorer(grid, 4, probabilities)
    plain.add((0, 0, 0), logits)
    soft.add((0, 0, 0), logits)
    clear = clear_of_ties(expected)
    np.testing.assert_array_equal(plain.labels[clear], expected.argmax(-1)[clear])
    np.testing.assert_array_equal(soft.labels, plain.labels)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    outside = np.ones(scan, bool)
    outside[tuple(slice(s, s + n) for s, n in zip((2, 0, 1), box, strict=True))] = False
    assert not plain.labels[outside].any()
    np.testing.assert_array_equal(probabilities[outside], [[1, 0, 0, 0]] * outside.sum())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks_of_any_cut_give_the_labels_of_the_whole(axis):
    box, shape = (11, 7, 10), (6, 9, 5)
    grid = ModelGrid(box, (0, 0, 0), box, shape, (1.0, 1.0, 1.0))
    logits = RNG.normal(size=(*shape, 3)).astype(np.float32)
    whole = Restorer(grid, 3)
    whole.add((0, 0, 0), logits)
    for cut in range(1, shape[axis] - 1):
        blocks = Restorer(grid, 3)
        # Neighbors share a voxel; the last block may be this voxel and one more.
        for begin, end in ((0, cut + 1), (cut, shape[axis])):
            start = [0, 0, 0]
            start[axis] = begin
            blocks.add(start, logits.take(range(begin, end), axis))
        np.testing.assert_array_equal(blocks.labels, whole.labels)


def test_a_block_of_one_voxel_that_is_not_the_last_restores_nothing():
    grid = ModelGrid((4, 4, 4), (0, 0, 0), (4, 4, 4), (4, 4, 4), (1.0, 1.0, 1.0))
    restorer = Restorer(grid, 2)
    restorer.add((1, 0, 0), np.full((1, 4, 4, 2), [0.0, 1.0], np.float32))
    assert not restorer.labels.any()


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_label_maps_have_the_smallest_integers(classes, dtype):
    grid = ModelGrid((2, 1, 1), (0, 0, 0), (2, 1, 1), (2, 1, 1), (1.0, 1.0, 1.0))
    restorer = Restorer(grid, classes)
    logits = np.zeros((2, 1, 1, classes), np.float32)
    logits[..., -1] = 1
    restorer.add((0, 0, 0), logits)
    assert restorer.labels.dtype == dtype
    assert (restorer.labels == classes - 1).all()


def test_flat_regions_and_corners_of_their_borders_agree_with_all_voxels_interpolated():
    # Few voxels are interpolated here, and the ones at edges and corners of a structure must be.
    shape, box = (6, 6, 6), (17, 13, 19)
    grid = ModelGrid(box, (0, 0, 0), box, shape, (1.0, 1.0, 1.0))
    for corner in itertools.product((1, 4), repeat=3):
        logits = np.zeros((*shape, 2), np.float32)
        logits[..., 0] = 1 + 0.1 * RNG.random(shape)
        logits[(*corner, 1)] = 5
        expected = grid.restore_logits(logits)
        restorer = Restorer(grid, 2)
        restorer.add((0, 0, 0), logits)
        clear = clear_of_ties(expected)
        np.testing.assert_array_equal(restorer.labels[clear], expected.argmax(-1)[clear])
        assert restorer.labels.any()
