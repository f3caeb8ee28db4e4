"""The page in a real browser, opened from a disk."""

import re

import numpy as np
import pytest

from unetr_flax.imaging.volume import Volume
from unetr_flax.viewing import write_page
from unetr_flax.viewing.labels import color_of
from unetr_flax.viewing.testing import find_browser, open_browser

SHAPE = (20, 24, 16)
# Not at the origin, with another size along each axis.
AFFINE = np.array([[1.5, 0, 0, -20], [0, 1, 0, 7], [0, 0, 2, -300], [0, 0, 0, 1]])
NAMES = {300: "</script><b>right & 'upper'</b>\n\"", 1: "left"}
SIZE = (900, 420)


@pytest.fixture(scope="module")
def scan():
    x, y, z = np.indices(SHAPE)
    image = (x + 40 * y + 1000 * z).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint16)
    # In the patient's right anterior superior corner, and in the opposite one.
    labels[13:18, 15:22, 10:14] = 300
    labels[2:6, 2:8, 2:6] = 1
    return Volume(image[..., None], AFFINE), labels


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium on the path, or its path in the variable CHROMIUM")
    with open_browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
def written(scan, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "case #1.html"
    write_page(path, *scan, NAMES, window=None)
    return path


@pytest.fixture
def page(browser, written):
    # Opening takes longer than a test, so that tests share what is open.
    if browser.run("location.href") != written.as_uri():
        show(browser, written)
    set_input(browser, "view", "3", "change")
    yield browser
    assert problems(browser) == []


def show(browser, path):
    browser.open(path, *SIZE)
    browser.wait("document.body?.dataset.ready")
    return browser


def problems(browser):
    # An answer comes after all events before it.
    browser.run("0")
    return browser.problems


def set_input(page, name, value, event="input"):
    page.run(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = {value!r}; "
        f"e.dispatchEvent(new Event('{event}')); }})()"
    )


def canvas(page):
    width = page.run("document.getElementById('canvas').clientWidth")
    assert 300 < width < SIZE[0] - 200
    return page.picture()[:, :width]


def near(picture, label):
    """Finds pixels with the hue of a label, [rows, columns]."""
    color = np.array(color_of(label)) - np.mean(color_of(label))
    pixels = picture - picture.mean(-1, keepdims=True)
    length = np.linalg.norm(pixels, axis=-1)
    return (length > 0.15) & (pixels @ color > 0.95 * length * np.linalg.norm(color))


def test_moves_windows_and_labels_change_the_picture(page, scan):
    set_input(page, "view", "0", "change")  # the axial plane alone
    set_input(page, "slice2", "11")
    upper = canvas(page)
    rows, columns = np.nonzero(near(upper, 300))
    # Anterior is up, and the patient's right on the left.
    assert len(rows) > 500
    assert rows.mean() < 0.45 * upper.shape[0]
    assert columns.mean() < 0.45 * upper.shape[1]
    assert not near(upper, 1).any()

    set_input(page, "slice2", "3")
    lower = canvas(page)
    rows, columns = np.nonzero(near(lower, 1))
    assert rows.mean() > 0.55 * lower.shape[0]
    assert columns.mean() > 0.55 * lower.shape[1]
    assert not near(lower, 300).any()

    unlabeled = ~near(lower, 1)
    set_input(page, "high", "5000", "change")
    brighter = canvas(page) - lower
    assert (brighter[unlabeled].min(-1) > 0.1).mean() > 0.2
    assert page.run("document.getElementById('preset').selectedOptions[0].text") == "Other"
    set_input(page, "preset", "0", "change")
    np.testing.assert_array_equal(canvas(page), lower)

    set_input(page, "opacity", "0")
    page.run("document.getElementById('outline').click()")
    assert not near(canvas(page), 1).any()
    set_input(page, "opacity", "0.5")
    assert near(canvas(page), 1).sum() > 300
    page.run("document.querySelector('#legend input').click()")
    assert not near(canvas(page), 1).any()
    page.run("document.getElementById('all').click()")
    page.run("document.getElementById('outline').click()")
    assert near(canvas(page), 1).sum() > 300


def test_three_planes_and_a_rendering(page):
    picture = canvas(page)
    middle = picture.shape[0] // 2, picture.shape[1] // 2
    for rows in (slice(0, middle[0]), slice(middle[0], None)):
        for columns in (slice(0, middle[1]), slice(middle[1], None)):
            assert (picture[rows, columns].max(-1) > 0.1).mean() > 0.2


def test_names_are_text_and_lead_to_their_labels(page, scan):
    volume, labels = scan
    assert page.run("document.title") == "case #1"
    names = page.run("[...document.querySelectorAll('#legend button')].map(b => b.textContent)")
    assert names == ["left", "</script><b>right & 'upper'</b> \""]
    for button, label in ((0, 1), (1, 300)):
        page.run(f"document.querySelectorAll('#legend button')[{button}].click()")
        voxel = [int(page.run(f"document.getElementById('slice{i}').value")) for i in range(3)]
        assert labels[tuple(voxel)] == label
        text = page.run("document.getElementById('readout').textContent")
        *mm, intensity = (float(number) for number in re.findall(r"-?[0-9.]+", text)[:4])
        np.testing.assert_allclose(mm, AFFINE[:3, :3] @ voxel + AFFINE[:3, 3], atol=0.06)
        assert intensity == volume.array[(*voxel, 0)]
        assert text.endswith(names[button])


def test_scan_without_labels(browser, scan, tmp_path):
    volume, labels = scan
    path = tmp_path / "page.html"
    write_page(path, volume, labels * 0, NAMES, window=None)
    show(browser, path)
    assert "No labels found" in browser.run("document.body.innerText")
    assert problems(browser) == []


def test_coarser_grid(browser, scan, tmp_path):
    _, labels = scan
    rng = np.random.default_rng(0)
    noise = Volume(rng.standard_normal((*SHAPE, 1)).astype(np.float32), AFFINE)
    path = tmp_path / "page.html"
    write_page(path, noise, labels, NAMES, window=None)
    largest = path.stat().st_size - 5000
    write_page(path, noise, labels, NAMES, window=None, max_bytes=largest)
    assert path.stat().st_size <= largest
    show(browser, path)
    assert "coarser grid" in browser.run("document.getElementById('notes').textContent")
    assert int(browser.run("document.getElementById('slice0').max")) < SHAPE[0] - 1
    for button, name in ((0, "left"), (1, "</script>")):
        browser.run(f"document.querySelectorAll('#legend button')[{button}].click()")
        text = browser.run("document.getElementById('readout').textContent")
        assert f", {name}" in text
        # The middle of the scan lies between both labels.
        x = float(text.split(",")[0])
        assert (x < -8) == (name == "left")
    assert problems(browser) == []


def test_problems_are_noticed(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<script>console.error('a'); setTimeout(() => { throw Error('b'); })</script>")
    browser.open(path, *SIZE)
    browser.wait("document.readyState == 'complete'")
    browser.run("new Promise((done) => setTimeout(done, 20))")
    console, exception = browser.problems
    browser.problems.clear()
    assert console == "console: a"
    assert "Error: b" in exception
