"""The process of one side of a race: reads commands line by line and answers in JSON."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.cases import SIDES, Case
from unetr_flax.runtime.cudnn import CudnnError
from unetr_flax.runtime.malloc import keep_freed_memory, return_freed_memory

LEARNING_RATE = 1e-4
CLASSES = 4
# Parts of the messages with which JAX, PyTorch, cuDNN and Python report too little memory.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory", "ALLOC_FAILED")


def main() -> None:
    """Answers commands from standard input until it is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("family")
    parser.add_argument("edge", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("dtype")
    parser.add_argument("--keep-freed-memory", action="store_true")
    options = parser.parse_args()
    # Answers get a stream of their own; everything that libraries print goes to the log.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if options.keep_freed_memory:
        keep_freed_memory()
    case = Case(options.family, options.edge, options.batch, options.dtype)
    try:
        side = make_side(options.side, case)
    except Exception as error:
        say(answers, **told(error))
        return
    say(answers, device=side.device)
    done = set()
    for command in map(str.strip, sys.stdin):
        try:
            answer = answer_to(command, side)
        except Exception as error:
            answer = told(error)
        if command not in done:
            # Frees the memory that only the first call needed, for all sides in the same way.
            return_freed_memory()
            done.add(command)
        say(answers, **answer)


def answer_to(command: str, side: Any) -> dict[str, Any]:
    """Executes a command: "forward", "step", "peak", "cost WHAT" or "profile FOLDER"."""
    verb, _, rest = command.partition(" ")
    if verb == "peak":
        return {"peak": peak_of_step(side)}
    if verb == "cost":
        cost = side.cost(rest)
        return {} if cost is None else dataclasses.asdict(cost)
    if verb == "profile":
        return profile(side, Path(rest))
    return timed(side, verb)


def told(error: Exception) -> dict[str, str]:
    """Turns an expected error into an answer.

    Raises:
      Exception: the error itself, if it is another.
    """
    if isinstance(error, CudnnError):
        return {"error": str(error)}
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return {"failure": "out of memory"}
    raise error


def make_side(name: str, case: Case) -> Any:
    """Makes a side; weights and batch are the same for all sides of a case."""
    # If two versions of cuDNN are installed, the one loaded first serves both: here JAX's.
    jax.devices()
    import torch

    from unetr_flax.parity.torch_models import torch_model_of

    torch.manual_seed(0)
    state_dict = torch_model_of(case.cfg).state_dict()
    rng = np.random.default_rng(0)
    cfg = case.cfg
    image = rng.standard_normal((case.batch, *cfg.img_size, cfg.in_channels), np.float32)
    labels = rng.integers(0, CLASSES, (case.batch, *cfg.img_size), dtype=np.int32)
    given = (case, state_dict, image, labels, LEARNING_RATE)
    if name.startswith("torch"):
        from benchmarks.torch_side import TorchSide

        return TorchSide(*given, channels_last=name != "torch", compile=name == "torch-compile")
    from benchmarks.flax_side import FlaxSide

    lowering = "xla" if name == "naive" else "auto"
    return FlaxSide(*given, remat=name == "ours-remat", lowering=lowering)


def timed(side: Any, command: str) -> dict[str, float]:
    """Runs "forward" or "step" once; seconds by the wall and of all cores, and what came out."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = side.forward() if command == "forward" else side.step()
    answer = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "value": [value],
    }
    if command == "forward":
        # Two statistics of the logits, which are enough to see whether two sides agree.
        logits = side.to_host(value)
        answer["value"] = [float(np.abs(logits).mean()), float(logits.std())]
    return answer


def resident_bytes(field: str = "VmRSS") -> int:
    """Returns the memory of this process, at present ("VmRSS") or at its peak ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}")


def peak_of_step(side: Any) -> int:
    """Takes a step; returns its peak of bytes, on the accelerator or, on CPU, of the process."""
    Path("/proc/self/clear_refs").write_text("5")
    on_device = side.peak_of_step()
    return resident_bytes("VmHWM") if on_device is None else on_device


def profile(side: Any, folder: Path) -> dict[str, str]:
    """Traces one step and returns the path of a list of its longest operations."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "operations.txt"
    if hasattr(side, "_device"):
        import torch

        with torch.profiler.profile() as trace:
            side.step()
        path.write_text(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        return {"trace": str(path)}
    with jax.profiler.trace(str(folder)):
        side.step()
    traces = sorted(folder.glob("**/*.xplane.pb"), key=os.path.getmtime)
    path.write_text(top_operations(jax.profiler.ProfileData.from_file(str(traces[-1]))))
    return {"trace": str(path)}


def top_operations(trace: Any, count: int = 30) -> str:
    """Lists the longest of XLA's operations in a trace: milliseconds, calls, name, one line each.

    A loop or conditional is listed in addition to the operations inside it.
    """
    totals: dict[str, tuple[float, int]] = {}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name:
                    spent, calls = totals.get(name, (0.0, 0))
                    totals[name] = spent + event.duration_ns / 1e6, calls + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return "".join(f"{spent:10.2f} ms {calls:6d} x {name}\n" for name, (spent, calls) in longest)


def say(answers: Any, **values: Any) -> None:
    """Writes one answer."""
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
