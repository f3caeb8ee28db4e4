import numpy as np

from unetr_flax.viewing.cross_sections import CrossSections


def test_sizes_and_places():
    labels = np.zeros((4, 5, 6), np.uint16)
    labels[1, 3, 4] = labels[1, 2, 4] = 700
    labels[3, 3, 0] = 1
    sections = CrossSections.of(labels)
    assert sections.ids == (1, 700)
    assert sections.voxels.tolist() == [1, 2]
    assert sections.centroids.tolist() == [[3, 3, 0], [1, 2.5, 4]]
    assert sections.boxes == [((3, 3, 0), (4, 4, 1)), ((1, 2, 4), (2, 4, 5))]
    assert sections.largest == [(3, 3, 0), (1, 2, 4)]
    assert sections.largest_of_all == (1, 3, 4)


def test_empty():
    sections = CrossSections.of(np.zeros((4, 5, 7), np.uint8))
    assert sections.ids == ()
    assert sections.voxels.shape == (0,)
    assert sections.centroids.shape == (0, 3)
    assert sections.boxes == sections.largest == []
    assert sections.largest_of_all == (2, 2, 3)
