"""The processes of a run: how they connect, which one writes, and what they tell each other."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from train.launch import LaunchError
from train.lost_process import HEARTBEAT_SECONDS

# Seconds that a process waits for the others to start: images of containers are pulled meanwhile.
START_SECONDS = 1800
# Seconds that processes wait for each other: one may read data or write results for hours.
MEET_SECONDS = 7 * 24 * 3600
# The numbers of the places where processes wait for each other.
_meetings = itertools.count()


class MainProcessError(RuntimeError):
    """An error of the main process, which reports the cause itself."""


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process with the others of a run; call before anything else uses a device.

    Without arguments JAX finds the processes that a cluster has started, see `train.launch`.

    Args:
      coordinator_address: host:port where process 0 listens.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.

    Raises:
      LaunchError: if the others cannot be found or reached.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LaunchError(f"the processes of the run cannot connect: {reason}") from error


def disconnect() -> None:
    """Ends the connection, for which every process waits; none may use the others after."""
    if jax.distributed.is_initialized():
        # JAX's own shutdown gives up after five minutes.
        meet()
        jax.distributed.shutdown()


def meet() -> None:
    """Waits until every process is here, however long one may take; a signal ends the wait.

    Collective operations give up after half an hour on CPU.
    """
    client = jax_distributed.global_state.client
    if client is None:
        return
    # Python handles no signals within a call of the client.
    pool = ThreadPoolExecutor(1, thread_name_prefix="meet")
    place = f"unetr_flax/train/meeting/{next(_meetings)}"
    met = pool.submit(client.wait_at_barrier, place, 1000 * MEET_SECONDS)
    pool.shutdown(wait=False)
    met.result()


def is_main() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def process_sum(values: np.ndarray) -> np.ndarray:
    """Sums integer arrays of one shape over all processes; every process must call it."""
    if jax.process_count() == 1:
        return values
    meet()
    return np.asarray(multihost_utils.process_allgather(values)).sum(0)


def process_min(value: int) -> int:
    """Returns the least of the values that the processes pass; every process must call it."""
    if jax.process_count() == 1:
        return value
    meet()
    # JAX gathers no more than 32 bits of a number.
    halves = np.array([value], np.int64).view(np.int32)
    return int(np.asarray(multihost_utils.process_allgather(halves)).view(np.int64).min())


def any_process(flag: bool) -> bool:
    """Returns whether any process passes True; every process must call it."""
    return bool(process_sum(np.array(flag, np.int32)))


def run_on_main(action: Callable[[], None]) -> None:
    """Runs an action on the main process while the others wait; if it fails, all processes fail.

    Raises:
      Exception: on the main process, whatever the action raises.
      MainProcessError: on the other processes, if the action raises.
    """
    error = None
    if is_main():
        try:
            action()
        except BaseException as e:
            error = e
    if any_process(error is not None):
        raise error or MainProcessError("process 0 has failed and says why")
