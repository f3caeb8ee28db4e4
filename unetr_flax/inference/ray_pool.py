"""Cases shared by the devices of a Ray cluster: one model per device, lost work is done again."""

import collections
import dataclasses
import importlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from unetr_flax.inference.outputs import CaseOutputs
from unetr_flax.inference.pipeline import Case, Outcome
from unetr_flax.inference.ray_worker import Segment, Worker

# A case that has lost so many workers is given up, since the case may be what ends them.
MAX_LOSSES = 3
# Seconds to wait while no worker is busy, for one to start or to become free.
PATIENCE = 600.0
# Seconds that busy workers have at the end to remove their temporary files.
GRACE = 10.0


@dataclasses.dataclass(frozen=True)
class Place:
    """What a worker takes of the cluster.

    Attributes:
      device: "GPU", or "node" for all CPUs of a node.
      options: its resources, and the node that it should be on, as Ray's actors take them.
    """

    device: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker does: it segments a case, or loads the models if there is none."""

    place: Place
    actor: Any
    case: Case | None


@dataclasses.dataclass(frozen=True)
class _Event:
    """The end of a job: with an outcome if it had a case, or with the problem that it met."""

    case: Case | None
    outcome: Outcome | None = None
    problem: str | None = None


class RayPool:
    """Workers on a Ray cluster: one per GPU, or one per node where no node has a GPU.

    Each worker loads the models once and segments one case after the other. Models, scans and
    results must have the same paths on all nodes. Cases are independent and files appear whole or
    not at all, so a case whose worker is lost is done again by another one.

    Args:
      address: "local" for this machine alone, else the address of a cluster, as for `ray.init`.
      device: "gpu" or "cpu"; None for GPUs if the cluster has any.
      cases: how many cases there are, and so workers at most.
      say: called with a line of text if a worker is lost.

    Raises:
      ValueError: if Ray is not installed, the cluster cannot be reached, or has no such device.
    """

    def __init__(self, address: str, device: str | None, cases: int, say: Callable[[str], None]):
        if device not in (None, "cpu", "gpu"):
            raise ValueError(f"--device {device}: must be cpu or gpu with --ray")
        ray = _import("ray")
        self._ray, self._address, self._say = ray, address, say
        self._jobs: dict[Any, _Job] = {}
        self._idle: list[tuple[Place, Any]] = []
        _connect(ray, address)
        self._places = find_places(ray.nodes(), device)[:cases]
        if not self._places:
            ray.shutdown()
            raise ValueError(f"--ray {address}: no node has a {(device or 'cpu').upper()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends all workers; those that are busy remove their temporary files before."""
        busy = [ref for ref, job in self._jobs.items() if job.case is not None]
        for ref in busy:
            self._jobs[ref].actor.stop.remote()
        if busy:
            self._ray.wait(busy, num_returns=len(busy), timeout=GRACE)
        self._ray.shutdown()

    def start(self, build: Callable[[], Segment]) -> None:
        """Starts all workers, and waits for the first.

        Args:
          build: loads the models and returns `segment_cases` with all but its cases and its
            progress callback; called in each worker, so it must be possible to pickle it.

        Raises:
          ValueError: if no worker starts, with what was wrong.
        """
        self._build = build
        for place in self._places:
            self._launch(place)
        problem = None
        while not self._idle:
            event = self._next_event()
            if event is None:
                problem = problem or f"none became free within {PATIENCE:.0f} s"
                raise ValueError(f"--ray {self._address}: no worker could start: {problem}")
            problem = event.problem or problem
        count, device = len(self._places), self._places[0].device
        self._say(f"{count} worker{'s' if count > 1 else ''} on Ray, one per {device}")

    def segment(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """Segments cases.

        Yields:
          The outcome of each case, once, in the order in which they end.
        """
        waiting = collections.deque(cases)
        missing = {case.name: case for case in cases}
        losses: collections.Counter[str] = collections.Counter()
        while missing:
            while waiting and self._idle:
                self._assign(waiting.popleft())
            event = self._next_event()
            if event is None:
                for case in missing.values():
                    yield Outcome(case, "failed", "no worker is left on the cluster")
                return
            outcome = event.outcome
            if event.case is not None and outcome is None:
                losses[event.case.name] += 1
                if losses[event.case.name] < MAX_LOSSES:
                    self._say(f"{event.case.name}: done again, its worker was lost")
                    waiting.appendleft(event.case)
                else:
                    error = f"lost its worker {MAX_LOSSES} times: {event.problem}"
                    outcome = Outcome(event.case, "failed", error)
            if outcome is not None:
                yield dataclasses.replace(outcome, case=missing.pop(outcome.case.name))

    def _launch(self, place: Place) -> None:
        # A second thread hears `stop` while the first is busy.
        actor = self._ray.remote(Worker).options(max_concurrency=2, **place.options).remote()
        self._jobs[actor.build.remote(self._build)] = _Job(place, actor, None)

    def _assign(self, case: Case) -> None:
        place, actor = self._idle.pop()
        self._jobs[actor.segment.remote(_absolute(case))] = _Job(place, actor, case)

    def _next_event(self) -> _Event | None:
        """Waits for the end of a job; None if no worker is busy, and none starts for long."""
        if not self._jobs:
            return None
        busy = any(job.case is not None for job in self._jobs.values())
        ended, _ = self._ray.wait(list(self._jobs), timeout=None if busy else PATIENCE)
        if not ended:
            return None
        job = self._jobs.pop(ended[0])
        try:
            result = self._ray.get(ended[0])
        except self._ray.exceptions.RayTaskError:
            # An error in the code of the worker, not its loss.
            raise
        except self._ray.exceptions.RayError as error:
            # A worker that cannot be reached may still run.
            self._ray.kill(job.actor)
            if job.case is not None:
                self._launch(job.place)
            return _Event(job.case, problem=str(error).partition("\n")[0])
        if job.case is None and result is not None:
            return _Event(None, problem=result)
        self._idle.append((job.place, job.actor))
        return _Event(job.case, outcome=result)


def find_places(nodes: Sequence[dict[str, Any]], device: str | None) -> list[Place]:
    """Finds where workers can be.

    Args:
      nodes: nodes of a cluster, as `ray.nodes` describes them.
      device: "gpu" or "cpu"; None for GPUs if there are any.
    """
    node_affinity = _import("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    alive = [node for node in nodes if node["Alive"]]
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in alive)
    if device == "gpu" or (device is None and gpus):
        return [Place("GPU", {"num_gpus": 1, "num_cpus": 0})] * gpus
    places = []
    for node in alive:
        # XLA uses all cores of a machine for one model.
        if cpus := int(node["Resources"].get("CPU", 0)):
            # Where the node is lost, its worker may start on another one that is free.
            there = node_affinity(node["NodeID"], soft=True)
            places.append(Place("node", {"num_cpus": cpus, "scheduling_strategy": there}))
    return places


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError("--ray needs Ray: pip install 'unetr-flax[ray]'") from None


def _connect(ray: Any, address: str) -> None:
    # Ray sends statistics of its usage unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:
            # Ray itself tries for minutes, and prints each of its attempts.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--ray {address}: cannot be reached: {reason}") from None


def _absolute(case: Case) -> Case:
    """Makes the paths of a case such that they do not depend on a worker's own folder."""
    images = tuple(Path(path).absolute() for path in case.files.images)
    return Case(
        case.name,
        dataclasses.replace(case.files, images=images),
        CaseOutputs(case.outputs.labels.absolute(), case.outputs.names.absolute()),
    )
