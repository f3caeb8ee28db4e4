import nibabel as nib
import numpy as np
import pytest

from benchmarks.predict_race import PredictionError, Run, run
from benchmarks.predict_report import Agreement, Report, compare
from benchmarks.predict_worker import NETWORK, READ, SUMS
from benchmarks.report import PACKAGES

MODULE = """
import json, os, sys, time
if sys.argv[1] == "fail":
    sys.exit("no luck")
memory = b"x" * 2**27
# Long enough for the memory to be seen on a busy machine.
time.sleep(0.5)
print("something else")
print(json.dumps({"seconds": {"read": 2.5}, "cache": os.environ["XDG_CACHE_HOME"]}))
"""


def test_a_run_is_measured_and_its_failure_told(tmp_path, monkeypatch):
    (tmp_path / "fake_side.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run(["fake_side", "work"], tmp_path / "cache", tmp_path / "log")
    assert [found.stage(name) for name in ("read", "write")] == [2.5, 0]
    assert found.answer["cache"] == str(tmp_path / "cache")
    assert 2**27 < found.peak < 2**31
    assert min(found.cpu, found.wall) > 0
    with pytest.raises(PredictionError, match=r"^fake_side: failed, .*log says why: no luck$"):
        run(["fake_side", "fail"], tmp_path / "cache", tmp_path / "log")


def test_label_maps_are_compared(tmp_path):
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    others = labels.copy()
    others[5, 5:15, 5:15] = 0  # a layer at the surface
    others[0, 0, 0] = 1  # and a voxel that is not
    for name, array in (("a", labels), ("b", others), ("c", 0 * labels)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    found = compare(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert found == Agreement(1800 / 1901, 101 / 8000, 100 / 101, (1000, 901))
    with pytest.raises(ValueError, match=r"\(1000, 0\) voxels of class 1"):
        compare(tmp_path / "a.nii.gz", tmp_path / "c.nii.gz")


def test_the_report_has_times_shares_and_ratios():
    def made(wall, peak, start=0.0):
        answer = {
            "seconds": {READ: wall / 10, NETWORK: wall / 2, SUMS: wall / 100},
            "first_window": start + 4.0,
            "windows": 75,
            "written": [5.0, 8.0],
            "programs": [1.0, 2.0],
        }
        return Run(wall, 2 * wall, peak, start, answer)

    ours, theirs = [made(10.0, 2**30), made(20.0, 2**30)], [made(30.0, 3 * 2**30)]
    where = {"processor": "A", "cores": 2, "python": "3"} | dict.fromkeys(PACKAGES, "1")
    small = made(6.0, 2**29, start=1.0)
    report = Report(
        where,
        "Settings.",
        {"ours": ours, "theirs": theirs},
        Agreement(0.95, 0.01, 0.98, (10, 11)),
        help=[small],
        cold=small,
        warm=[small],
        second=small,
        sliding=small,
    )
    text = report.markdown()
    assert "| ours | 15.0 s | 20.0, 10.0 s | 30 s | 1.00 GiB | 1.00 x |" in text
    assert "| theirs | 30.0 s | 30.0, 30.0 s | 60 s | 3.00 GiB | 2.00 x |" in text
    assert "| network | 7.5 s, 50% | 15.0 s, 50% |" in text
    assert "| write |" not in text  # no side has this stage
    assert "with kept programs | 4.0 s |" in text
    assert "| 3.0 s, 0 programs compiled |" in text
    assert report.as_json()["sides"]["ours"][0]["wall"] == 10
