import dataclasses
import importlib.metadata
import json

import numpy as np
import pytest

from parity_tests import configs
from parity_tests.page import page
from parity_tests.ratio_rows import RatioRow
from parity_tests.report import Report, as_json, console_tables, describe, markdown
from unetr_flax.parity.rows import compare_arrays
from unetr_flax.parity.twins import make_twins


def row(name, error, dtype="float32"):
    exact = np.ones((2, 3), dtype)
    return compare_arrays("activations", name, exact + exact.dtype.type(error), exact)


@pytest.fixture(scope="module")
def report():
    twins = make_twins(configs.PATCH_16, "float32", batch=1)
    rows = [row("first", 0), row("a<b>", 1e-6), row("first", 1e-15, "float64")]
    rows.append(RatioRow("half precision", "logits", "bfloat16", 1e-3, 2e-3, 1.1))
    return Report([describe("model", twins, "w.pt")], rows, left_out=["masks: none"])


def test_page_is_one_escaped_file_with_the_verdict_first(report):
    text = page(report)
    assert text == page(report)
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    for link in ("http://", "https://", "src=", "url("):
        assert link not in text.replace("http://www.w3.org/", "").replace("url(#", "")
    places = [text.index(word) for word in ("HOLDS: 4 of 4", "0.500", "<svg", "SHA-256")]
    assert places == sorted(places)
    assert report.models[0].weights_sha256 in text
    for package in ("jax", "flax", "torch", "monai"):
        assert f"{package} {importlib.metadata.version(package)}" in text


def test_a_difference_changes_the_verdict(report):
    for wrong in (row("far", 0.1), row("none", np.nan)):
        failing = dataclasses.replace(report, all_rows=[*report.all_rows, wrong])
        assert "DIFFERS: 4 of 5" in page(failing)
        assert "DIFFERS: 4 of 5" in markdown(failing)
        assert f"activations: {wrong.name}, float32" in page(failing)
    worse = RatioRow("half precision", "logits", "float16", 1.2, 1.0, 1.1)
    assert "class=bad" in page(dataclasses.replace(report, all_rows=[worse]))


def test_nothing_compared_is_no_success():
    report = Report([], [], left_out=["masks: none"])
    assert report.verdict == "NOTHING COMPARED: 0 of 0 comparisons within tolerance; 1 left out"
    assert report.status == 2
    assert 'class="verdict bad"' in page(report)
    assert report.verdict in markdown(report)


def test_numbers_relative_to_another_array_are_told(report):
    other = np.array([4.0, -8.0])
    beside = compare_arrays("gradients", "b", np.ones(2), np.zeros(2), beside=("weight<1>", other))
    told = dataclasses.replace(report, all_rows=[*report.all_rows, beside])
    sentence = "that of 1 gradients which are zero in exact arithmetic is relative to the largest"
    for text, name in ((page(told), "b, beside weight&lt;1&gt;"), (markdown(told), "weight<1>")):
        assert sentence in text
        assert name in text
    assert sentence not in page(report)
    assert as_json(told)["rows"][-1]["relative"] == 1 / 8


def test_ratios_of_errors_that_are_no_numbers_fail():
    for ours, theirs in ((np.nan, 1.0), (1.0, np.nan), (1.0, 0.0)):
        assert not RatioRow("half precision", "logits", "float16", ours, theirs, 1.1).ok
    assert RatioRow("half precision", "logits", "float16", 0.0, 0.0, 1.1).ok


def test_json_and_tables_hold_everything(report):
    far = dataclasses.replace(report, all_rows=[row("nan", np.nan)])
    assert json.loads(json.dumps(as_json(far), allow_nan=False))["rows"][0]["relative"] is None
    found = json.loads(json.dumps(as_json(report)))
    assert [len(found[key]) for key in ("rows", "half_precision", "models")] == [3, 1, 1]
    assert found["models"][0]["image_sha256"] == report.models[0].image_sha256
    assert [table.row_count for table in console_tables(report)] == [2, 1]


def test_digests_are_those_of_weights_and_image(report):
    same = make_twins(configs.PATCH_16, "float32", batch=1)
    other = make_twins(configs.PATCH_16, "float32", batch=1, seed=1)
    assert describe("model", same, "w.pt") == report.models[0]
    changed = describe("model", other, "w.pt")
    assert changed.weights_sha256 != report.models[0].weights_sha256
    assert changed.image_sha256 != report.models[0].image_sha256
