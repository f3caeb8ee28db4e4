"""The climb: all chosen rungs, one after the other, for a model and a small one of its family."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from parity_tests.causes import explain_rows
from parity_tests.devices import use_platform
from parity_tests.ladder import RUNGS, AnyRow
from parity_tests.options import Options
from parity_tests.ratio_rows import RatioRow
from parity_tests.report import Model, Report, describe
from unetr_flax import UNETRConfig
from unetr_flax.parity.rows import Row, worst_of
from unetr_flax.parity.twins import Twins, make_twins, precise
from unetr_flax.runtime.garbage import collector_paused

# A TPU has no float64.
DTYPES = {"cpu": ("float64", "float32"), "gpu": ("float64", "float32"), "tpu": ("float32",)}
TITLES = {
    "model": "model",
    "small": "small model of the same family",
    "tiny": "tiny model of the same family, for training",
}


# Volumes for smaller models: a training accumulates two parts.
REDUCED_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """A rung that is climbed with twins of one dtype."""

    name: str
    dtype: str

    @property
    def model(self) -> str:
        """The model that is compared: "model", or "small" or "tiny" for smaller ones."""
        reduce = RUNGS[self.name].reduce
        return "model" if reduce is None else reduce.__name__


def plan(options: Options, family: str, dtypes: tuple[str, ...]) -> tuple[list[Step], list[str]]:
    """Decides which rungs are climbed in which dtypes.

    Args:
      options: those of the command.
      family: the model's family.
      dtypes: dtypes that the platform has, the first of which smaller models have.

    Returns:
      The steps, those of a model and dtype in a row; and what is left out, a line each.
    """
    left_out, climbed = [], []
    for name in options.rungs:
        rung = RUNGS[name]
        if rung.families is not None and family not in rung.families:
            left_out.append(f"{name}: family {family!r} has no such option")
        elif options.out_channels < rung.fewest_classes:
            needed = f"needs {rung.fewest_classes} classes"
            left_out.append(f"{name}: {needed}, --out-channels is {options.out_channels}")
        elif not set(rung.dtypes) & set(dtypes):
            left_out.append(f"{name}: needs float64, which {options.platform} does not have")
        else:
            climbed.append(name)
    given = [name for name in climbed if RUNGS[name].reduce is None]
    steps = [Step(name, dtype) for dtype in dtypes for name in given if dtype in RUNGS[name].dtypes]
    steps += [Step(name, dtypes[0]) for name in climbed if name not in given]
    return steps, left_out


@dataclasses.dataclass
class Part:
    """What one process found.

    Attributes:
      steps: the steps that were taken, with their comparisons.
      models: the models that were compared, by kind.
      left_out: lines that say which rungs were not climbed.
      why: lines that say why comparisons do not hold.
    """

    steps: list[tuple[Step, list[AnyRow]]] = dataclasses.field(default_factory=list)
    models: dict[str, Model] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)
    why: list[str] = dataclasses.field(default_factory=list)


Done = Callable[[Step, list[AnyRow]], None]


def climb(
    options: Options,
    cfg: UNETRConfig,
    state_dict: Mapping[str, Any] | None = None,
    done: Done = lambda step, rows: None,
    *,
    parallel: bool = False,
) -> Report:
    """Climbs the chosen rungs and finds out why comparisons do not hold.

    Args:
      options: those of the command.
      cfg: the model's configuration.
      state_dict: weights of the model; random ones if None. Those of smaller models are random.
      done: called after each step.
      parallel: whether a second process climbs with the smaller models meanwhile.
    """
    steps, left_out = plan(options, cfg.family, DTYPES[options.platform])
    given = [step for step in steps if step.model == "model"]
    reduced = [step for step in steps if step.model != "model"]
    if parallel and given and reduced:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            with _interrupts_ignored():
                other = pool.submit(_climb_alone, options, cfg, reduced)
            try:
                parts = [climb_steps(options, cfg, given, state_dict, done), other.result()]
            except BaseException:
                # The other process may have minutes to go, and the pool waits for it.
                for process in multiprocessing.active_children():
                    process.kill()
                raise
        for taken in parts[1].steps:
            done(*taken)
    else:
        parts = [climb_steps(options, cfg, part, state_dict, done) for part in (given, reduced)]
    return Report(
        [model for part in parts for model in part.models.values()],
        [row for part in parts for _, rows in part.steps for row in rows],
        [line for part in parts for line in part.why],
        left_out + [line for part in parts for line in part.left_out],
        options.platform,
    )


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Makes processes that are started meanwhile ignore Ctrl-C, which reaches them too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _climb_alone(options: Options, cfg: UNETRConfig, steps: list[Step]) -> Part:
    """Climbs in a fresh process."""
    use_platform(options.platform)
    return climb_steps(options, cfg, steps)


def climb_steps(
    options: Options,
    cfg: UNETRConfig,
    steps: list[Step],
    state_dict: Mapping[str, Any] | None = None,
    done: Done = lambda step, rows: None,
) -> Part:
    """Takes some steps; arguments as in `climb`."""
    name = "random weights" if options.checkpoint is None else options.checkpoint.name
    part = Part()
    twins: dict[str, Twins] = {}
    with precise():
        for step in steps:
            reduce = RUNGS[step.name].reduce
            key = step.dtype if reduce is None else step.model
            # Steps in float32 come after those in float64.
            wide = twins.get("float64") if reduce is None else None
            if key not in twins and wide is not None:
                twins[key] = wide.astype(step.dtype)
            elif key not in twins:
                twins[key] = make_twins(
                    cfg if reduce is None else reduce(cfg),
                    step.dtype,
                    batch=options.batch if reduce is None else REDUCED_BATCH,
                    seed=options.seed,
                    state_dict=state_dict if reduce is None else None,
                )
            if step.model not in part.models:
                weights = name if reduce is None else "random weights"
                part.models[step.model] = describe(TITLES[step.model], twins[key], weights)
            try:
                with torch_threads(1), collector_paused():
                    found = list(RUNGS[step.name].compare(twins[key]))
            except ModuleNotFoundError as error:
                package = str(error.name).partition(".")[0]
                part.left_out.append(f"{step.name}: {package} is not installed")
                continue
            part.steps.append((step, found))
            done(step, found)
    rows = [row for _, found in part.steps for row in found if isinstance(row, Row)]
    part.why = explain_rows(rows, twins)
    return part


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limits PyTorch's threads.

    Threads that wait for each other after each operation of a small model gain nothing, and lose
    most of the time where other processes use the cores, as the second process of a climb does.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def told(step: Step, rows: list[AnyRow]) -> str:
    """Describes a step that is done, in one line."""
    numbers = [row for row in rows if isinstance(row, Row)]
    ratios = [row for row in rows if isinstance(row, RatioRow)]
    words = [f"{step.dtype} {step.name}: {len(rows)} comparisons"]
    if numbers:
        words.append(f"worst {worst_of(numbers).relative:.1e}")
    if ratios:
        words.append(f"largest ratio {max(row.ratio for row in ratios):.2f}")
    return ", ".join(words)
