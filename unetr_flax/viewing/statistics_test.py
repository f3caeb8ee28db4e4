import io
import json

import numpy as np
import pytest

from unetr_flax.imaging.volume import Volume
from unetr_flax.viewing.statistics import label_statistics, print_table, to_json

# Oblique and sheared, voxels of 0.8 x 1.5 x 3 mm before that.
AFFINE = np.array(
    [[0.8, 0.1, 0, -40], [-0.1, 1.5, 0.2, 12.5], [0, 0.3, 3, -700], [0, 0, 0, 1]], float
)
NAMES = {0: "background", 1: "kidney", 2: "absent", 300: "cyst\nor <tumor>"}


@pytest.fixture(scope="module")
def scan():
    rng = np.random.default_rng(0)
    # A large offset: a difference of sums of squares in float32 would lose the deviation.
    image = rng.standard_normal((5, 6, 7, 2)).astype(np.float32) + np.float32([0, 4000])
    labels = np.zeros((5, 6, 7), np.uint16)
    labels[1:3, 2:5, 3:5] = 1
    labels[2, 3, 3] = 0
    labels[3:, 1:3, 1:4] = 300
    labels[1, 1, 1] = 7
    return Volume(image, AFFINE), labels


def test_equal_to_definitions(scan):
    volume, labels = scan
    statistics = label_statistics(volume, labels, NAMES)
    assert [row.id for row in statistics] == [1, 2, 7, 300]
    assert [row.name for row in statistics] == ["kidney", "absent", "label 7", "cyst or <tumor>"]
    for row in (statistics[0], *statistics[2:]):
        where = np.argwhere(labels == row.id)
        values = volume.array[labels == row.id].astype(float)
        assert row.voxels == len(where)
        assert row.volume_ml == pytest.approx(len(where) * abs(np.linalg.det(AFFINE)) / 1000)
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(row, name), getattr(values, name)(0), rtol=1e-12)
        points = where @ AFFINE[:3, :3].T + AFFINE[:3, 3]
        np.testing.assert_allclose(row.centroid_mm, points.mean(0), rtol=1e-12)
        assert row.bounding_box == (tuple(where.min(0)), tuple(where.max(0) + 1))
    assert [row.touches_border for row in statistics] == [False, None, False, True]


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_each_face_is_a_border(scan, axis, end):
    volume, _ = scan
    index = [2, 2, 2]
    index[axis] = end
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[tuple(index)] = 1
    (row,) = label_statistics(volume, labels, {})
    assert row.touches_border


def test_class_without_voxels_and_empty_map(scan):
    volume, labels = scan
    rows = label_statistics(volume, np.zeros_like(labels), {0: "background", 1: "kidney"})
    assert [(row.id, row.voxels, row.mean, row.touches_border) for row in rows] == [
        (1, 0, None, None)
    ]
    assert label_statistics(volume, np.zeros_like(labels), {}) == []


def test_json_and_table_hold_the_same(scan):
    statistics = label_statistics(*scan, NAMES)
    rows = json.loads(to_json(statistics))
    assert [row["id"] for row in rows] == [1, 2, 7, 300]
    assert rows[0]["mean"] == list(statistics[0].mean)
    assert rows[1]["bounding_box"] is None
    out = io.StringIO()
    print_table(statistics, out)
    header, first, absent, *_, last = out.getvalue().splitlines()
    assert len(out.getvalue().splitlines()) == 5
    assert header.split()[:4] == ["id", "name", "voxels", "ml"]
    assert first.split()[:4] == ["1", "kidney", "11", f"{statistics[0].volume_ml:.3f}"]
    assert absent.split()[-2:] == ["-", "-"]
    assert "cyst or <tumor>" in last
    assert last.endswith("yes")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((5, 6, 8), int), "labels: shape (5, 6, 8), must be the scan's (5, 6, 7)"),
        (np.zeros((5, 6, 7)), "labels: float64, must be integers"),
        (np.full((5, 6, 7), -1), "labels: -1 to -1, must be 0 to 65535"),
        (np.full((5, 6, 7), 65536), "labels: 65536 to 65536, must be 0 to 65535"),
    ],
)
def test_labels_that_do_not_fit(scan, labels, message):
    with pytest.raises(ValueError, match="labels: ") as error:
        label_statistics(scan[0], labels, {})
    assert str(error.value) == message
