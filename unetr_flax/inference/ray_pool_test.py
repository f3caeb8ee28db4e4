import _thread
import functools
import os
import socket
import sys
import threading
import time
import types

import jax
import nibabel as nib
import numpy as np
import pytest

from unetr_flax.imaging import Window
from unetr_flax.imaging.case_files import find_cases
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.inference.outputs import CaseOutputs, Extras
from unetr_flax.inference.pipeline import Case, segment_cases
from unetr_flax.inference.ray_pool import RayPool, find_places
from unetr_flax.inference.ray_worker import Worker
from unetr_flax.inference.segment import Segmenter
from unetr_flax.inference.testing import brighter_than_half, fake_predictor

CT = Preprocessing(("CT",), (Window(-100, 100),))


def build(seconds, probabilities=False):
    """Builds a worker that takes some seconds for a batch of windows."""

    def slow(windows):
        time.sleep(seconds)
        return brighter_than_half(windows)

    return functools.partial(
        segment_cases,
        Segmenter(fake_predictor(slow), CT),
        extras=Extras(probabilities=probabilities),
        postprocess=lambda labels: None,
        allow_nan=False,
    )


def fail():
    raise ValueError("the model is not there")


def end_process_for(name):
    """Builds a worker whose process ends, as if killed, at a case of some name."""
    segment = build(0)

    def ends(cases, progress):
        if cases[0].name == name:
            os._exit(1)
        return segment(cases, progress=progress)

    return ends


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
        Case(files.name, files, CaseOutputs.of_file(folder / "out" / f"{files.name}.nii.gz"))
        for files in find_cases(folder / "scans", 1)
    ]


def interrupt_once_there_is(pattern, folder):
    """Raises KeyboardInterrupt in the main thread, as Ctrl-C does, once a file is there."""

    def watch():
        for _ in range(600):
            if list(folder.glob(pattern)):
                return _thread.interrupt_main()
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()


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
def cluster():
    """A cluster of a head without CPUs and two nodes with one each."""
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
    lines: list[str] = []
    outcomes = []
    with RayPool(cluster.address, "cpu", len(cases), lines.append) as pool:
        pool.start(functools.partial(build, 0.1))
        for outcome in pool.segment(cases):
            outcomes.append(outcome)
            # One worker has just ended a case; another one that has begun its own is lost, or the
            # next case goes to a lost one.
            if len(nodes) == 2 and any(job.case is not None for job in pool._jobs.values()):
                cluster.remove_node(nodes.pop(), allow_graceful=False)
    assert len(nodes) == 1
    assert len(outcomes) == len(cases)
    assert lines[0] == "2 workers on Ray, one per node"
    assert any("done again, its worker was lost" in line for line in lines[1:])
    assert_all_done_once(cases, outcomes)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_case_that_ends_its_workers_is_given_up(tmp_path):
    pytest.importorskip("ray")
    cases = make_cases(tmp_path, 3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ValueError, match=f"--ray {address}: cannot be reached: "):
        RayPool(address, None, 3, print)
    with pytest.raises(ValueError, match="no node has a GPU"):
        RayPool("local", "gpu", 3, print)
    with RayPool("local", None, 3, print) as pool:
        with pytest.raises(ValueError, match="no worker could start: the model is not there"):
            pool.start(fail)
        pool.start(functools.partial(end_process_for, "p1/1"))
        outcomes = {outcome.case.name: outcome for outcome in pool.segment(cases)}
    assert outcomes["p1/1"].status == "failed"
    assert "lost its worker 3 times" in outcomes["p1/1"].error
    done = [case for case in cases if case.name != "p1/1"]
    assert_all_done_once(done, [outcomes[case.name] for case in done])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ctrl_c_leaves_no_file_of_a_busy_worker(tmp_path):
    pytest.importorskip("ray")
    [case, *_] = make_cases(tmp_path, 1)

    def segment():
        with RayPool("local", None, 1, print) as pool:
            pool.start(functools.partial(build, 1.0, probabilities=True))
            interrupt_once_there_is("p0/.*.tmp", tmp_path / "out")
            list(pool.segment([case]))

    with pytest.raises(KeyboardInterrupt):
        segment()
    assert list((tmp_path / "out" / "p0").iterdir()) == []


def node(name, **resources):
    return {"NodeID": name * 28, "Alive": name != "dd", "Resources": resources}


def test_a_worker_whose_models_are_more_than_memory_holds_says_so():
    def run_out():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmore\nlines")

    assert Worker().build(run_out) == "RESOURCE_EXHAUSTED: Out of memory.: more, and 1 more"


def test_a_worker_is_for_each_gpu_or_each_node(monkeypatch):
    strategies = types.SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node[:2])
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.util", types.ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    nodes = [node("aa", CPU=0), node("bb", CPU=4, GPU=2), node("cc", CPU=2), node("dd", CPU=8)]
    assert [place.options for place in find_places(nodes, None)] == [
        {"num_gpus": 1, "num_cpus": 0}
    ] * 2
    assert find_places(nodes, "gpu") == find_places(nodes, None)
    assert [place.options for place in find_places(nodes, "cpu")] == [
        {"num_cpus": 4, "scheduling_strategy": "bb"},
        {"num_cpus": 2, "scheduling_strategy": "cc"},
    ]
    assert find_places(nodes[2:], None) == find_places(nodes, "cpu")[1:]
    assert find_places(nodes[2:], "gpu") == []


def test_without_ray_one_line_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"^--ray needs Ray: pip install 'unetr-flax\[ray\]'$"):
        RayPool("local", None, 1, print)
    with pytest.raises(ValueError, match="--device gpu:0: must be cpu or gpu with --ray"):
        RayPool("local", "gpu:0", 1, print)
