import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from unetr_flax.imaging.volume import Volume, VolumeError
from unetr_flax.viewing import preview
from unetr_flax.viewing.labels import color_of
from unetr_flax.viewing.preview import write_preview


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    monkeypatch.setattr(preview, "DPI", 40)


def scan(spacing=(1, 2, 4), channels=1):
    rng = np.random.default_rng(0)
    image = rng.random((12, 10, 8, channels), np.float32) * 100
    labels = np.zeros((12, 10, 8), np.uint16)
    # In the patient's right anterior superior corner.
    labels[7:, 5:, 4:] = 300
    return Volume(image, np.diag([*spacing, 1.0])), labels


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_labels_are_where_the_letters_say(tmp_path):
    path = tmp_path / "case.png"
    volume, labels = scan()
    # All one gray, so that each colored pixel is a label's.
    write_preview(path, Volume(volume.array * 0, volume.affine), labels, {}, window=None)
    picture = matplotlib.image.imread(path)[..., :3]
    height, width, _ = picture.shape
    figure = preview._draw(volume, labels, {}, None)
    panels = [axes.get_position() for axes in figure.axes]
    assert len(panels) == 6
    for i, panel in enumerate(panels):
        rows = picture[round((1 - panel.y1) * height) : round((1 - panel.y0) * height)]
        inside = rows[:, round(panel.x0 * width) : round(panel.x1 * width)]
        colored = np.ptp(inside, axis=-1) > 0.15
        middle = colored.shape[0] // 2, colored.shape[1] // 2
        if i % 2 == 0:
            assert not colored.any()
        else:
            # Right and anterior are on the left in all planes, anterior and superior on top.
            corner = colored[: middle[0] - 2, : middle[1] - 2]
            assert corner.mean() > 0.8
            assert colored.sum() - colored[: middle[0] + 3, : middle[1] + 3].sum() == 0
    assert list(tmp_path.iterdir()) == [path]


def test_panels_have_one_scale_in_mm():
    volume, labels = scan()
    figure = preview._draw(volume, labels, {}, None)
    sizes = [axes.get_position().size * figure.get_size_inches() for axes in figure.axes]
    mm = np.array([(12, 20), (12, 20), (12, 32), (12, 32), (20, 32), (20, 32)])
    np.testing.assert_allclose(sizes / sizes[0][0], mm / 12, rtol=1e-6)


def test_legend_and_notes():
    volume, labels = scan(channels=2)
    labels[0, 0, 0] = 1
    figure = preview._draw(volume, labels, {300: "a $b$ <c>\nd"}, (-175.0, 250.0))
    found = texts(figure)
    # 120 voxels of 8 mm3 each.
    assert {"a $b$ <c> d", "0.8 ml", "label 1", "0.0 ml"} <= set(found)
    assert {"Axial\nslice 5 of 8", "Coronal\nslice 6 of 10", "Sagittal\nslice 8 of 12"} <= set(
        found
    )
    assert sum(text in "RLAPSI" for text in found) == 24
    (foot,) = (text for text in found if "Radiological" in text)
    assert "Window -175 to 250." in foot
    assert "Channel 1 of 2." in foot
    colors = [patch.get_facecolor()[:3] for patch in figure.findobj(matplotlib.patches.Rectangle)]
    assert any(np.allclose(np.array(color_of(300)) / 255, color) for color in colors)


def test_names_beyond_the_font_and_the_legend(tmp_path):
    volume, labels = scan()
    labels[0, 0, 0] = 1
    names = {1: "\N{CJK UNIFIED IDEOGRAPH-813E} Nierenlager", 300: "x" * 100}
    # A missing letter would be a warning, which is an error in tests.
    write_preview(tmp_path / "a.png", volume, labels, names, window=None)
    found = texts(preview._draw(volume, labels, names, None))
    assert {"\N{REPLACEMENT CHARACTER} Nierenlager", "x" * 23 + "…"} <= set(found)


def test_no_labels():
    volume, labels = scan()
    assert "No labels found" in texts(preview._draw(volume, labels * 0, {300: "x"}, None))


def test_more_classes_than_the_legend_holds(monkeypatch):
    monkeypatch.setattr(preview, "LARGEST_LEGEND_COLUMNS", 1)
    volume, labels = scan()
    labels.ravel()[:80] = np.arange(80)
    found = texts(preview._draw(volume, labels, {}, None))
    assert any(text.startswith("and ") and text.endswith(" more") for text in found)


def test_scans_of_single_slices(tmp_path):
    volume = Volume(np.ones((1, 4, 1, 1), np.float32), np.eye(4))
    write_preview(tmp_path / "a.png", volume, np.ones((1, 4, 1), np.uint8), {}, window=None)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    volume, labels = scan()
    with pytest.raises(VolumeError, match="pip install 'unetr-flax"):
        write_preview(tmp_path / "a.png", volume, labels, {}, window=None)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/case\.png'$"):
        write_preview(tmp_path / "none" / "case.png", *scan(), {}, window=None)
