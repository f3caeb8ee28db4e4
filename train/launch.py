"""How the processes of a run were started, read from what their launcher left in the environment.

JAX itself finds the processes that Slurm, Open MPI, Kubernetes and TPU pods have started. Other
launchers say in variables how many processes there are, which one this is and where the first one
listens, and these are read here. Where a launcher has started several processes that cannot find
each other, each would train alone in the same folder, so this is an error.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path

# The port of process 0 where a launcher names its host only; JAX's own default on TPU pods.
PORT = 8476

# Variables that say how many processes a launcher has started, and which one this is.
COUNTS = {
    "JAX_NUM_PROCESSES": "JAX_PROCESS_ID",
    "SKYPILOT_NUM_NODES": "SKYPILOT_NODE_RANK",
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "WORLD_SIZE": "RANK",
}
# Where JAX reads everything from these variables itself.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
GKE_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")
# The devices of the kernel's TPU drivers.
TPU_DEVICES = ("accel0", "vfio/0")


class LaunchError(ValueError):
    """Processes that cannot find each other; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """The processes of a run; all fields are None where JAX finds the processes itself.

    Attributes:
      coordinator_address: host:port where process 0 listens.
      num_processes: number of processes.
      process_id: number of this process, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_launch(environ: Mapping[str, str], dev: Path = Path("/dev")) -> Launch | None:
    """Finds out how this process was started.

    Args:
      environ: the environment's variables.
      dev: folder of the machine's devices.

    Returns:
      The processes of the run, or None if this process is alone.

    Raises:
      LaunchError: if there are several processes that cannot find each other, or a variable is not
        a number.
    """
    given = {name: environ[name] for name in COUNTS if name in environ}
    counts = {name: _number(environ, name) for name in given}
    several = {name: count for name, count in counts.items() if count > 1}
    for name in ("JAX_NUM_PROCESSES", "SKYPILOT_NUM_NODES"):
        if name in several and (address := _address(environ, name)):
            return Launch(address, several[name], _number(environ, COUNTS[name]))
    if "SLURM_NTASKS" in several and all(name in environ for name in SLURM):
        return Launch()
    if "OMPI_COMM_WORLD_SIZE" in several and all(name in environ for name in OPEN_MPI):
        return Launch()
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        # The launcher counts the processes, and the user says where they meet.
        for name, count in several.items():
            if (rank := COUNTS[name]) in environ:
                return Launch(address, count, _number(environ, rank))
    for name, count in several.items():
        if name in ("JAX_NUM_PROCESSES", "SKYPILOT_NUM_NODES") or COUNTS[name] in environ:
            raise LaunchError(
                f"{name}={count}: {count} processes were started that cannot find each other, and "
                "would each train alone; set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0 for "
                f"all of them{_advice(name)}, or start one process"
            )
    if all(name in environ for name in GKE_TPU):
        slices = _number({"MEGASCALE_NUM_SLICES": "1", **environ}, "MEGASCALE_NUM_SLICES")
        return Launch() if slices > 1 or "," in environ["TPU_WORKER_HOSTNAMES"] else None
    if all(name in environ for name in KUBERNETES) and importlib.util.find_spec("kubernetes"):
        return Launch()
    if _on_tpu(dev) and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        # On the machines of a TPU pod nothing but Google's metadata server tells of the others.
        return Launch()
    return None


def _address(environ: Mapping[str, str], name: str) -> str | None:
    """Returns where process 0 listens, as the launcher with this variable says; None if unsaid."""
    if name == "SKYPILOT_NUM_NODES":
        hosts = environ.get("SKYPILOT_NODE_IPS", "").split()
        return f"{hosts[0]}:{PORT}" if hosts else None
    return environ.get("JAX_COORDINATOR_ADDRESS")


def _advice(name: str) -> str:
    return ", start them with srun" if name == "SLURM_NTASKS" else ""


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise LaunchError(f"{name}={value}: must be a whole number, set by the launcher")
    return int(value)


def _on_tpu(dev: Path) -> bool:
    has_chips = any((dev / name).exists() for name in TPU_DEVICES)
    return has_chips and importlib.util.find_spec("libtpu") is not None
