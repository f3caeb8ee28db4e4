import functools
import time

import nibabel as nib
import numpy as np
import pytest

from unetr_flax.imaging import Window
from unetr_flax.imaging.case_files import find_cases
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.inference.outputs import CaseOutputs, Extras
from unetr_flax.inference.pipeline import Case, segment_cases
from unetr_flax.inference.ray_pool import RayPool
from unetr_flax.inference.segment import Segmenter
from unetr_flax.inference.testing import brighter_than_half, fake_predictor

CT = Preprocessing(("CT",), (Window(-100, 100),))


def build(seconds):
    """Builds a worker that takes some seconds for a batch of windows."""

    def slow(windows):
        time.sleep(seconds)
        return brighter_than_half(windows)

    return functools.partial(
        segment_cases,
        Segmenter(fake_predictor(slow), CT),
        extras=Extras(),
        postprocess=lambda labels: None,
        allow_nan=False,
    )


def fail():
    raise ValueError("the model is not there")


def make_cases(folder, count):
    rng = np.random.default_rng(0)
    for i in range(count):
        scan = rng.normal(scale=100, size=(9, 8, 7)).astype(np.float32)
        (folder / "scans" / f"p{i % 3}").mkdir(parents=True, exist_ok=True)
        nib.save(
            nib.Nifti1Image(scan, np.diag([1, 2, 3, 1])), folder / f"scans/p{i % 3}/{i}.nii.gz"
        )
    (folder / "scans/p0/broken.nii.gz").write_bytes(b"no scan")
    return [
        Case(files.name, files, CaseOutputs(folder / "out" / f"{files.name}.nii.gz"))
        for files in find_cases(folder / "scans", 1)
    ]


def progress(case, done, count):
    pass


def assert_all_done_once(cases, outcomes):
    assert sorted(outcome.case.name for outcome in outcomes) == [case.name for case in cases]
    for outcome in outcomes:
        path = outcome.case.outputs.labels
        if outcome.case.name == "p0/broken":
            assert outcome.status == "failed"
            assert not path.exists()
            continue
        assert outcome.status == "done", outcome.error
        assert outcome.case in cases
        scan = nib.load(outcome.case.files.images[0])
        expected = np.asarray(scan.dataobj) > 0
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected)
        assert outcome.voxels[1] == expected.sum()


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of a head without CPUs and two nodes of one each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_cases_of_a_lost_node_are_done_again(cluster, tmp_path):
    cluster, nodes = cluster
    cases = make_cases(tmp_path, 12)
    lines = []
    outcomes = []
    with RayPool(cluster.address, "cpu", len(cases), lines.append) as pool:
        pool.start(functools.partial(build, 0.1))
        for outcome in pool.segment(cases):
            outcomes.append(outcome)
            print(time.time(), outcome.case.name, lines)
            if len(outcomes) == 4:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
    assert lines[0] == "2 workers on Ray, one per node"
    assert any("done again, its worker was lost" in line for line in lines[1:])
    assert_all_done_once(cases, outcomes)
