"""The launch files in docs/launch can be read, and start commands that the parser takes."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from train.command_line import parse
from train.launch import PORT, find_launch
from train.run_testing import TINY, records

FOLDER = Path(__file__).parent.parent / "docs" / "launch"
SCRIPTS = ("slurm.sh", "tpu_pod.sh")
DOCUMENTS = ("kubernetes.yaml", "skypilot.yaml")


def parsed(command):
    """Parses the options of the command that a text has."""
    (line,) = re.findall(r"python -m train ([^\n]*)", command.replace("\\\n", " "))
    line = line.split(";")[0].rstrip('"')
    cfg = parse(shlex.split(re.sub(r"\"?\$\{?\w+\}?\"?", "/shared", line)))
    cfg.check()
    assert cfg.run.resume == "auto"
    assert cfg.data.data is not None
    assert cfg.run.out is not None
    return cfg


def load(name):
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_train(name):
    path = FOLDER / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    parsed(path.read_text())


def test_slurm_s_tasks_share_the_batch():
    text = (FOLDER / "slurm.sh").read_text()
    nodes, tasks, gpus = (
        int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1])
        for name in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus
    assert parsed(text).data.batch_size % (nodes * tasks) == 0


def test_the_tpu_pod_s_chips_share_the_batch():
    text = (FOLDER / "tpu_pod.sh").read_text()
    cfg = parsed(text)
    chips = int(re.search(r"--accelerator-type v5litepod-(\d+)", text)[1])
    assert cfg.data.batch_size % (chips // cfg.run.depth_shards) == 0
    assert cfg.data.roi_size[0] // cfg.model.patch_size[0] % cfg.run.depth_shards == 0


def test_kubernetes_pods_find_each_other():
    job_set = load("kubernetes.yaml")
    assert job_set["kind"] == "JobSet"
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    cfg = parsed(" ".join(container["command"]))
    assert cfg.data.batch_size % job["completions"] == 0
    assert pod["terminationGracePeriodSeconds"] >= 60
    environ = {item["name"]: item.get("value", "1") for item in container["env"]}
    launch = find_launch({**environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    name = job_set["metadata"]["name"]
    host = f"{name}-{replicated['name']}-0-0.{name}"
    assert launch.coordinator_address == f"{host}:{container['ports'][0]['containerPort']}"
    assert launch.num_processes == job["completions"] == job["parallelism"]
    (claim,) = pod["volumes"]
    assert container["volumeMounts"][0]["name"] == claim["name"]


def test_skypilot_s_machines_share_the_batch():
    task = load("skypilot.yaml")
    cfg = parsed(task["run"])
    assert cfg.data.batch_size % task["num_nodes"] == 0
    assert task["resources"]["ports"] == PORT
    subprocess.run(["bash", "-n", "-c", task["setup"] + task["run"]], check=True)


def test_ray_s_workers_are_recognized():
    tree = ast.parse((FOLDER / "ray_train.py").read_text())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    environ = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "h:1"}
    assert environ.keys() <= names
    assert find_launch(environ).num_processes == 2


def process_of_run(out, process_id):
    """Finds the process of `python -m train` that is one of those of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        launched = f"JAX_PROCESS_ID={process_id}".encode() in environ
        if launched and b"train" in arguments and os.fsencode(out) in arguments:
            return int(folder.name)
    raise AssertionError(f"no process {process_id} of {out}")


@pytest.mark.slow
def test_ray_starts_a_run_again_when_a_worker_dies(tmp_path):
    pytest.importorskip("ray.train.v2.jax", reason="needs pip install 'ray[train]'")
    out, log = tmp_path / "run", tmp_path / "log"
    script = [sys.executable, str(FOLDER / "ray_train.py"), "2"]
    command = [*script, *TINY, "--epochs", "12", "--out", str(out)]
    root = FOLDER.parents[1]
    with log.open("w") as output:
        ray = subprocess.Popen(command, cwd=root, stdout=output, stderr=output)
        try:
            while not (out / "metrics.jsonl").exists() or len(records(out)) < 6:
                assert ray.poll() is None, log.read_text()
                time.sleep(0.2)
            os.kill(process_of_run(out, 1), signal.SIGKILL)
            assert ray.wait(timeout=500) == 0, log.read_text()
        finally:
            ray.kill()
    starts = [int(step) for step in re.findall(r"starts at step (\d+)", log.read_text())]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    trained = [record["step"] for record in records(out) if record["kind"] == "train"]
    assert trained == sorted(set(trained))
    assert len(trained) == 12
    assert (out / "model" / "config.json").exists()
