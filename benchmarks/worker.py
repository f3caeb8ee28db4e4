"""One side of a race in a process of its own: reads commands line by line, answers in JSON."""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import SIDES, Case
from unetr_flax.malloc import keep_freed_memory
from unetr_flax.parity.originals import pytorch_original

LEARNING_RATE = 1e-4
CLASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("family")
    parser.add_argument("edge", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("dtype")
    parser.add_argument("--keep-freed-memory", action="store_true")
    options = parser.parse_args()
    # Whatever a library prints goes to the log, not between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if options.keep_freed_memory:
        keep_freed_memory()
    case = Case(options.family, options.edge, options.batch, options.dtype)
    with contextlib.ExitStack() as stack:
        side = make_side(options.side, case, stack)
        say(answers, resident=resident_bytes())
        for line in sys.stdin:
            command = line.strip()
            if command == "peak":
                say(answers, peak=peak_of_step(side))
            elif command.startswith("profile "):
                say(answers, **profile(side, Path(command.removeprefix("profile "))))
            else:
                say(answers, **timed(side, command))


def make_side(name: str, case: Case, stack: contextlib.ExitStack) -> Any:
    """The side, with weights and a batch that are the same for all sides of a case."""
    torch.manual_seed(0)
    state_dict = pytorch_original(case.cfg).state_dict()
    rng = np.random.default_rng(0)
    cfg = case.cfg
    image = rng.standard_normal((case.batch, *cfg.img_size, cfg.in_channels), np.float32)
    labels = rng.integers(0, CLASSES, (case.batch, *cfg.img_size), dtype=np.int32)
    given = (case, state_dict, image, labels, LEARNING_RATE)
    if name.startswith("torch"):
        from benchmarks.torch_side import TorchSide

        return TorchSide(*given, channels_last=name != "torch", compile=name == "torch-compile")
    from benchmarks.flax_side import FlaxSide, plain_modules

    if name == "naive":
        stack.enter_context(plain_modules())
    return FlaxSide(*given, remat=name == "ours-remat")


def timed(side: Any, command: str) -> dict[str, float]:
    """Runs "forward" or "step" once; seconds by the wall and of all cores, and what came out."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    value = side.forward() if command == "forward" else side.step()
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        # Enough of the logits to see that two sides agree.
        "value": [float(np.abs(value).mean()), float(value.std())]
        if command == "forward"
        else [value],
    }


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process, now ("VmRSS") or at most so far ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}")


def peak_of_step(side: Any) -> int:
    """Bytes at most in one more step: on the accelerator if there is one, else of the process."""
    import jax

    if torch.cuda.is_available() and hasattr(side, "_device"):
        torch.cuda.reset_peak_memory_stats()
        side.step()
        return torch.cuda.max_memory_allocated()
    device = jax.devices()[0]
    if device.platform != "cpu" and not hasattr(side, "_device"):
        side.step()
        return device.memory_stats()["peak_bytes_in_use"]
    Path("/proc/self/clear_refs").write_text("5")
    side.step()
    return resident_bytes("VmHWM")


def profile(side: Any, folder: Path) -> dict[str, str]:
    """Traces one step; where the trace is."""
    if hasattr(side, "_device"):
        with torch.profiler.profile() as trace:
            side.step()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "operations.txt"
        path.write_text(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        return {"trace": str(path)}
    import jax

    with jax.profiler.trace(str(folder)):
        side.step()
    return {"trace": str(folder)}


def say(answers: Any, **values: Any) -> None:
    """One answer."""
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
