"""A segmentation as one HTML file that opens in a browser, without a network."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from unetr_flax.imaging.volume import Volume
from unetr_flax.runtime.atomic import commit, staged
from unetr_flax.viewing import niivue
from unetr_flax.viewing.cross_sections import CrossSections
from unetr_flax.viewing.labels import check_labels, color_of, name_of
from unetr_flax.viewing.page_data import encode, gray_step
from unetr_flax.viewing.planes import CONVENTION
from unetr_flax.viewing.windows import window_presets

OPACITY = 0.5
CONTROLS = (
    "Click to move the lines, scroll for other slices, drag with the right button for another "
    "window, drag the rendering to turn it."
)
# Room for the note about a coarser grid.
GRID_NOTE_BYTES = 1000
SMALLEST_SCAN_BYTES = 5_000


def write_page(
    path: Path,
    volume: Volume,
    labels: np.ndarray,
    names: Mapping[int, str],
    *,
    window: tuple[float, float] | None,
    max_bytes: int = 20_000_000,
) -> None:
    """Writes a page with three linked planes and a rendering, to scroll through with the mouse.

    The page is one file that holds the scan, its labels and the viewer (NiiVue), so it opens from
    a disk and without a network; it needs a browser with WebGL 2. It offers windows, the opacity
    and outlines of the labels, and a legend that hides single labels and goes to them. Of an image
    with several channels the first is shown.

    Args:
      path: the file to write, whole or not at all; its folder must exist.
      volume: the scan, [X, Y, Z, C] on the canonical grid.
      labels: class ids [X, Y, Z] on the same grid, 0 is the background.
      names: names of classes by id.
      window: lowest and highest intensity of a CT, from black to white, in Hounsfield units; None
        for images without a unit, shown by percentiles of their nonzero voxels.
      max_bytes: largest size of the page; a scan that needs more is resampled, its labels to the
        nearest voxel, and the page says so.

    Raises:
      ValueError: if the label map does not fit the scan, or if `max_bytes` is too small for the
        viewer, or if the viewer's file is damaged.
      VolumeError: if nibabel or scipy is not installed.
      OSError: if the file cannot be written.
    """
    check_labels(volume, labels)
    page = _build(_title(path), volume, labels, names, window, max_bytes)
    with staged(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        commit(temporary, path)


def _title(path: Path) -> str:
    # Names of files may hold bytes that are no text.
    return path.name.removesuffix(".html").encode("utf-8", "replace").decode("utf-8")


def _build(
    title: str,
    volume: Volume,
    labels: np.ndarray,
    names: Mapping[int, str],
    window: tuple[float, float] | None,
    max_bytes: int,
) -> str:
    sections = CrossSections.of(labels)
    image = volume.array[..., 0]
    presets = window_presets(image, window)
    facts = _facts(volume, sections, names)
    facts["title"] = title
    facts["presets"] = [{"name": name, "window": window} for name, window in presets.items()]
    texts = {
        "TITLE": html.escape(title),
        "VERSION": niivue.VERSION,
        "STYLE": _asset("page.css"),
        "DATA": _json(facts),
        "VIEWER": _script(niivue.read_niivue()),
        "SCRIPT": _script(_asset("page.js")),
        "LICENSES": html.escape(_asset("LICENSES.txt")),
    }
    texts["POLICY"] = _policy(texts["VIEWER"], texts["SCRIPT"])
    template = _asset("page.html")
    used = GRID_NOTE_BYTES + sum(len(text.encode()) for text in (template, *texts.values()))
    if max_bytes < used + SMALLEST_SCAN_BYTES:
        raise ValueError(
            f"max_bytes={max_bytes}: must be at least {used + SMALLEST_SCAN_BYTES}, as the viewer "
            "alone needs most of that"
        )
    data = encode(
        image,
        _numbered(labels, sections.ids),
        volume.affine,
        step=gray_step(image, next(iter(presets.values())), calibrated=window is not None),
        max_bytes=max_bytes - used,
    )
    if data.shape != labels.shape:
        facts["notes"].append(
            f"Shown on a coarser grid than the scan's, to keep the page small: {_grid(data.shape)} "
            f"voxels of {_grid(data.spacing)} mm, not {_grid(labels.shape)} of "
            f"{_grid(volume.spacing)} mm. Volumes are those of the scan's own grid."
        )
        texts["DATA"] = _json(facts)
    return Template(template).substitute(texts, IMAGE=data.image, LABELS=data.labels)


def _facts(volume: Volume, sections: CrossSections, names: Mapping[int, str]) -> dict[str, Any]:
    """Collects what the page's script reads; voxels are those of the scan's grid."""
    *shape, channels = volume.array.shape
    notes = [CONTROLS, CONVENTION]
    if channels > 1:
        notes.append(f"Channel 1 of {channels} is shown.")
    entries = [
        {
            "name": name_of(label, names),
            "color": color_of(label),
            "ml": voxels * volume.voxel_ml,
            "voxel": largest,
        }
        for label, voxels, largest in zip(
            sections.ids, sections.voxels.tolist(), sections.largest, strict=True
        )
    ]
    return {
        "notes": notes,
        "opacity": OPACITY,
        "shape": shape,
        "start": sections.largest_of_all,
        "labels": entries,
    }


def _json(facts: dict[str, Any]) -> str:
    """Formats as JSON for a script element, in which "<" is the only letter with a meaning."""
    return json.dumps(facts).replace("<", "\\u003c")


def _numbered(labels: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """Replaces class ids by their position among those that occur, from 1."""
    numbers = np.zeros(max(ids, default=0) + 1, np.min_scalar_type(len(ids)))
    numbers[list(ids)] = np.arange(1, len(ids) + 1)
    return numbers[labels]


def _grid(values: tuple[float, ...]) -> str:
    return " x ".join(
        f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in values
    )


def _asset(name: str) -> str:
    return (niivue.ASSETS / name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """Escapes what would end a script element or begin a comment; within strings only."""
    return re.sub("<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


def _policy(*scripts: str) -> str:
    """Allows the browser to run these scripts and nothing else, and to fetch nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )
