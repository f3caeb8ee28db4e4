import base64
import gzip
import hashlib
import html
import json
import re

import numpy as np
import pytest

from unetr_flax.imaging.volume import Volume
from unetr_flax.viewing import niivue, write_page

EVIL = "</script><script>alert(1)</script> & \"quoted\" 'so'\nnext <!-- line"


def scan(channels=1):
    image = np.random.default_rng(0).normal(0, 200, (6, 7, 8, channels)).astype(np.float32)
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[2:5, 1:3, 4] = 9
    return Volume(image, np.diag([1.0, 2.0, 5.0, 1.0])), labels


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "<b>&.html"
    write_page(path, *scan(channels=2), {9: EVIL}, window=(-175, 250))
    assert list(path.parent.iterdir()) == [path]
    return path.read_text()


def elements(page, name):
    """Finds the attributes and contents of elements as a browser would, for raw text elements."""
    return re.findall(rf"<{name}([^>]*)>(.*?)</{name}", page, flags=re.DOTALL | re.IGNORECASE)


def test_names_are_data_and_never_markup(page):
    scripts = elements(page, "script")
    assert len(scripts) == 5
    data = json.loads(scripts[0][1])
    (label,) = data["labels"]
    assert label["name"] == " ".join(EVIL.split())
    assert label["ml"] == pytest.approx(0.06)
    assert label["voxel"] == [2, 1, 4]
    assert data["title"] == "<b>&"
    assert "Channel 1 of 2 is shown." in data["notes"]
    assert data["presets"][0] == {"name": "Model's window", "window": [-175, 250]}
    (title,) = elements(page.split("<script")[0], "title")
    assert title[1] == "&lt;b&gt;&amp;"


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_fetched(page):
    policy = html.unescape(re.search('Content-Security-Policy" content="([^"]*)"', page)[1])
    scripts = [text for attributes, text in elements(page, "script") if not attributes]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert f"script-src {allowed};" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?[^\s"'>]""", page.split("<script")[0])


def test_the_viewer_is_as_published_and_comes_with_its_licenses(page):
    assert niivue.read_niivue() in [text for _, text in elements(page, "script")]
    assert "Copyright (c) 2021, Niivue" in page
    licenses = (niivue.ASSETS / "LICENSES.txt").read_text()
    assert niivue.SHA256 in licenses
    assert html.escape(licenses) in page


# Without a fixed time the bytes, and so the test's name, would differ from process to process.
@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(b"other", mtime=0)[:-3]])
def test_damaged_viewer(tmp_path, monkeypatch, content):
    monkeypatch.setattr(niivue, "ASSETS", tmp_path)
    (tmp_path / f"niivue-{niivue.VERSION}.umd.js.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"umd\.js\.gz: damaged or replaced"):
        niivue.read_niivue()


def test_replaced_viewer(tmp_path, monkeypatch):
    monkeypatch.setattr(niivue, "ASSETS", tmp_path)
    content = gzip.compress(b"alert(1)")
    (tmp_path / f"niivue-{niivue.VERSION}.umd.js.gz").write_bytes(content)
    with pytest.raises(ValueError, match="must be NiiVue"):
        niivue.read_niivue()


def test_nothing_is_left_where_a_page_cannot_be(tmp_path):
    volume, labels = scan()
    with pytest.raises(ValueError, match="max_bytes=1000: must be at least 2"):
        write_page(tmp_path / "a.html", volume, labels, {}, window=None, max_bytes=1000)
    with pytest.raises(ValueError, match="labels: shape"):
        write_page(tmp_path / "a.html", volume, labels[1:], {}, window=None)
    assert not list(tmp_path.iterdir())


def test_file_name_that_is_no_text(tmp_path):
    path = tmp_path / "a\udcff.html"
    write_page(path, *scan(), {}, window=None)
    assert elements(path.read_text(), "title")[0][1] == "a?"
