import io

import numpy as np
from matplotlib import image

from unetr_flax.evaluation.comparison import DIFFERENCES, Comparison, draw_comparison
from unetr_flax.evaluation.drawing import label_color


def pixels_of(picture, color):
    """Finds the pixels of a color within the panels, as fractions of the picture [2, pixels]."""
    pixels = image.imread(io.BytesIO(picture))[..., :3]
    # The legend below has every color.
    panels = pixels[: int(0.93 * len(pixels))]
    found = np.argwhere(np.abs(panels - color).max(-1) < 0.01)
    return (found / pixels.shape[:2]).T


def test_each_voxel_has_the_color_of_its_label_and_of_its_error():
    label = np.zeros((12, 10, 8), np.int32)
    # At the patient's right, front and head, where pictures have left and top.
    label[8:11, 7:9, 5:7] = 3
    label[2:4, 2:4, 1:3] = 7
    prediction = np.where(label == 3, 0, label)
    prediction[2:4, 2:4, 1:3] = 5
    prediction[8:10, 2:4, 5:7] = 7
    case = Comparison("a $case", prediction, label, (1.0, 2.0, 1.5))
    picture = draw_comparison(case, {3: "three", 5: "five", 7: "seven"})
    third = pixels_of(picture, label_color(3))
    # In the row of the label alone, and in the upper left of each panel.
    assert third.shape[1] > 1000
    assert third[0].max() < 1 / 3
    assert third[1].min() < 0.15
    assert pixels_of(picture, label_color(5))[0].min() > 1 / 3
    for _, color in DIFFERENCES:
        rows, _ = pixels_of(picture, color)
        assert len(rows) > 1000
        assert rows.min() > 0.6


def test_labels_without_a_name_are_not_drawn():
    label = np.full((4, 5, 6), 2, np.int32)
    picture = draw_comparison(Comparison("case", 0 * label, label, (1.0, 1.0, 1.0)), {1: "one"})
    for color in (label_color(1), label_color(2), *(color for _, color in DIFFERENCES)):
        assert not pixels_of(picture, color).size
