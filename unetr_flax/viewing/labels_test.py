import numpy as np

from unetr_flax.viewing.labels import color_of, label_counts, name_of


def test_colors_of_many_classes_differ_from_each_other_and_from_gray():
    colors = [color_of(label) for label in range(1, 121)]
    assert len(set(colors)) == len(colors)
    for color in [*colors, color_of(65535)]:
        assert max(color) - min(color) > 40
        assert all(0 <= value <= 255 for value in color)


def test_names_are_printable_and_on_one_line():
    names = {1: " left\n kidney\t", 2: "", 3: "a\x1b[31mb"}
    assert name_of(1, names) == "left kidney"
    assert name_of(2, names) == "label 2"
    assert name_of(3, names) == "a\N{REPLACEMENT CHARACTER}[31mb"
    assert name_of(4, names) == "label 4"


def test_label_counts():
    assert label_counts(np.array([[[0, 3], [9, 3]]])) == {3: 2, 9: 1}
    assert label_counts(np.zeros((2, 2, 2), np.uint8)) == {}
