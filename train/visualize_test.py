import matplotlib.image
import numpy as np
import pytest

from train.visualize import Column, axial_view, save_predictions

NAMES = ["background", "liver", "spleen"]
SHAPE = (20, 16, 7)


def case(name="a", shape=SHAPE, spacing=(1.0, 1.0, 5.0)):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Column(name, image, np.zeros(shape, np.uint8), np.zeros(shape, np.int32), spacing)


def colored(path):
    """Marks the colored pixels of a picture without its legend, [3 rows, height, width]."""
    pixels = matplotlib.image.imread(path)[..., :3]
    # A little less than the legend's 0.33 inches, so that no panel is cut.
    legend = 45
    pixels = pixels[: (len(pixels) - legend) // 3 * 3]
    return (np.ptp(pixels, axis=-1) > 0.15).reshape(3, -1, pixels.shape[1])


def test_axial_view_has_anterior_up_and_right_on_the_left():
    plane = np.array([["left posterior", "left anterior"], ["right posterior", "right anterior"]])
    expected = [["right anterior", "left anterior"], ["right posterior", "left posterior"]]
    np.testing.assert_array_equal(axial_view(plane), expected)


@pytest.mark.parametrize(
    ("cases", "spacing", "size"),
    [
        # (0.25 + 2.2 n) inches wide; 3 panels of 2.2 inches x 16/20, or x 16 x 2/20, and 0.63
        (1, (1.0, 1.0, 5.0), (886, 367)),
        (2, (1.0, 1.0, 5.0), (886, 697)),
        (2, (0.5, 1.0, 5.0), (1678, 697)),
    ],
)
def test_size_follows_cases_and_proportions(tmp_path, cases, spacing, size):
    save_predictions(tmp_path / "a.png", [case(spacing=spacing)] * cases, NAMES)
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    np.testing.assert_allclose((height, width), size, atol=1)


@pytest.mark.filterwarnings("error")
def test_names_are_not_read_as_formulas_or_as_private(tmp_path):
    # "$\\frac$" is no valid formula, and matplotlib hides labels that begin with an underscore.
    for i, name in enumerate(["$\\frac$", "_hidden", "x"]):
        shown = case(name=name)
        save_predictions(tmp_path / f"{i}.png", [shown], ["background", name])
    pictures = [matplotlib.image.imread(tmp_path / f"{i}.png") for i in range(3)]
    legends = [(picture[-45:, :, :3] < 0.5).any(-1).sum() for picture in pictures]
    assert legends[0] > legends[2]
    assert legends[1] > legends[2]


def test_shows_the_slice_with_most_foreground_in_radiological_orientation(tmp_path):
    shown = case()
    shown.label[14:18, 10:14, 4] = 1  # right, anterior
    shown.label[1, 1, 2] = 2
    shown.prediction[14:18, 10:14, 4] = 1
    shown.prediction[:, :, 2] = 2
    save_predictions(tmp_path / "a.png", [shown], NAMES)
    image, label, prediction = colored(tmp_path / "a.png")
    assert not image.any()
    # 4 x 4 of 20 x 16 voxels in one place, not the whole of slice 2.
    for overlay in (label, prediction):
        rows, columns = np.nonzero(overlay)
        assert 0.5 < len(rows) / (overlay.size * 16 / 320) < 1
        assert columns.max() < overlay.shape[1] / 2
        assert rows.max() < overlay.shape[0] / 2


def test_a_case_without_label_shows_what_was_predicted(tmp_path):
    shown = case()
    shown.prediction[:, :, 5] = 1
    save_predictions(tmp_path / "a.png", [shown], NAMES)
    _, label, prediction = colored(tmp_path / "a.png")
    assert not label.any()
    assert prediction.mean() > 0.5


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (1.0, 2.0, 5.0), (2.0, 1.0, 1.0)])
def test_voxels_have_their_physical_proportions(tmp_path, spacing):
    shown = case(spacing=spacing)
    shown.prediction[:, :, 5] = 1
    save_predictions(tmp_path / "a.png", [shown], NAMES)
    rows, columns = np.nonzero(colored(tmp_path / "a.png")[2])
    expected = (SHAPE[1] * spacing[1]) / (SHAPE[0] * spacing[0])
    np.testing.assert_allclose(np.ptp(rows) / np.ptp(columns), expected, rtol=0.05)


def test_many_classes_and_empty_cases(tmp_path):
    shown = case(shape=(9, 12, 3))
    shown.label[..., 1] = np.arange(9 * 12).reshape(9, 12) % 26
    names = [f"structure {i}" for i in range(26)]
    save_predictions(tmp_path / "a.png", [shown, case(), case(shape=(3, 30, 2))], names)
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.zeros((20, 16, 6), int)}, r"a: label has shape \(20, 16, 6\), must be the"),
        ({"prediction": np.zeros((16, 20, 7), int)}, r"a: prediction has shape \(16, 20, 7\)"),
        ({"image": np.zeros((20, 16))}, r"a: image has shape \(20, 16\), must be \[X, Y, Z\]"),
        ({"spacing": (1.0, 1.0)}, r"a: spacing=\(1\.0, 1\.0\), must be three positive numbers"),
        ({"label": np.full(SHAPE, 3)}, r"a: label has classes from 3 to 3, must be in \[0, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_predictions(tmp_path / "a.png", [case()._replace(**change)], NAMES)
    assert not (tmp_path / "a.png").exists()


def test_nothing_to_show_is_named(tmp_path):
    with pytest.raises(ValueError, match="cases: none given"):
        save_predictions(tmp_path / "a.png", [], NAMES)
    with pytest.raises(ValueError, match=r"class_names=\['background'\]: must be background and"):
        save_predictions(tmp_path / "a.png", [case()], NAMES[:1])
