"""Trains on the machines of a Ray cluster, with Ray Train's JaxTrainer: one process per worker.

python docs/launch/ray_train.py NUM_WORKERS --data /data/Task09_Spleen --out /data/runs/spleen

Run it from the root of the repository, which all machines must have at the same path, as they must
the data and the run's folder. A worker that fails is started again together with the others, and
the run goes on from its last checkpoint.
"""

import os
import subprocess
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxTrainer

PORT = 8476


def train(config: dict) -> None:
    """Runs python -m train as one of the processes of a run.

    The run is a process of its own: it handles signals, and connects with the others by itself.
    """
    context = get_context()
    address = broadcast_from_rank_zero(f"{ray.util.get_node_ip_address()}:{PORT}")
    launch = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(context.get_world_size()),
        "JAX_PROCESS_ID": str(context.get_world_rank()),
    }
    command = [sys.executable, "-m", "train", *config["args"]]
    subprocess.run(command, env=os.environ | launch, cwd=config["folder"], check=True)


def main(num_workers: int, args: list[str]) -> None:
    """Trains with so many workers, on GPUs where the cluster has any."""
    ray.init(ignore_reinit_error=True)
    use_gpu = "GPU" in ray.cluster_resources()
    trainer = JaxTrainer(
        train,
        train_loop_config={"args": [*args, "--resume", "auto"], "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
