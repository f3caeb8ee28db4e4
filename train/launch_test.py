import importlib.util
import os
import socket
import subprocess
import sys

import pytest

from train.launch import Launch, LaunchError, find_launch

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
JAX = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


@pytest.fixture
def modules(monkeypatch):
    """The names of optional packages that are installed, which a test adds to."""
    names = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM, Launch()),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, Launch()),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "h:1"}, Launch("h:1", 4, 3)),
        (SKYPILOT, Launch("10.0.0.1:8476", 2, 1)),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "1"}, None),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1", "JAX_COORDINATOR_ADDRESS": "h:1"},
            Launch("h:1", 2, 1),
        ),
        (GKE, Launch()),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a"}, None),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Launch()),
        # Kubernetes says nothing of the others without its package.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_launchers_are_recognized(environ, launch, modules, tmp_path):
    assert find_launch(environ, tmp_path) == launch


def test_jobs_of_kubernetes_and_tpu_pods_are_found_by_jax(modules, tmp_path):
    modules |= {"kubernetes", "libtpu"}
    job = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert find_launch(job, tmp_path) == Launch()
    assert find_launch({}, tmp_path) is None
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    assert find_launch({}, tmp_path) == Launch()
    assert find_launch({"JAX_PLATFORMS": "cpu"}, tmp_path) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            r"^SLURM_NTASKS=2: 2 processes were started that cannot find each other.*with srun",
        ),
        ({"WORLD_SIZE": "8", "RANK": "0"}, "^WORLD_SIZE=8: 8 processes were started"),
        (JAX, "^JAX_NUM_PROCESSES=4: .* set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}, "^SKYPILOT_NUM_NODES=2: "),
        ({"JAX_NUM_PROCESSES": "two"}, "^JAX_NUM_PROCESSES=two: must be a whole number"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"},
            "^JAX_PROCESS_ID=: must be a whole number",
        ),
    ],
)
def test_processes_that_would_each_train_alone_are_noticed(environ, message, modules, tmp_path):
    with pytest.raises(LaunchError, match=message) as error:
        find_launch(environ, tmp_path)
    assert "\n" not in str(error.value)


PROGRAM = """
import dataclasses, os, sys
import jax
from train import distributed
from train.launch import find_launch
distributed.connect(*dataclasses.astuple(find_launch(os.environ)))
assert distributed.process_sum(1) == 2
print(jax.process_index())
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "open_mpi", "jax"])
def test_processes_connect_as_launched(launcher):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables, rank = {
        "slurm": (SLURM, "SLURM_PROCID"),
        "open_mpi": (OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
        "jax": (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"},
            "JAX_PROCESS_ID",
        ),
    }[launcher]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_COORDINATOR_PORT": port} | variables | {rank: str(i)},
        )
        for i in range(2)
    ]
    shown = [process.communicate(timeout=120)[0] for process in processes]
    # The collective library may have printed a line before.
    assert [text.split()[-1] for text in shown] == ["0", "1"]
