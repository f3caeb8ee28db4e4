"""Limits of a device, measured on it, and the operations and traffic of a program.

The roofline (Williams et al. 2009): a program of F operations that moves B bytes takes at least
max(F / operations per second, B / bytes per second).
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.cases import environment

# Edge of the matrices and megabytes of the copy that are used to measure a device.
SIZES = {"cpu": (2048, 256), "gpu": (8192, 2048), "tpu": (8192, 2048)}
TURNS, CALLS = 5, 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's figures for a program.

    Attributes:
      flops: operations of the model, where a multiplication and an addition are two. They are
        counted in the model as it is written, not as it is lowered, so that a lowering with more
        operations does not look faster.
      traffic: bytes that the compiled program's operations read and write; fused operations count
        once.
      needed: bytes of arguments, results and intermediate results; donated ones count once.
    """

    flops: float
    traffic: float
    needed: int


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Limits of a device.

    Attributes:
      flops: operations per second in a product of large square matrices.
      bandwidth: bytes read and written per second in a copy that is larger than any cache.
    """

    flops: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """Returns the least time that a program can take."""
        return max(cost.flops / self.flops, cost.traffic / self.bandwidth)


def cost_of(function: jax.stages.Wrapped, compiled: jax.stages.Compiled, *arguments) -> Cost | None:
    """Returns the cost of a jitted function; None where this platform's XLA has no figures.

    Args:
      function: a function of `jax.jit`.
      compiled: the same function, compiled for these arguments.
      *arguments: arrays, or their shapes and dtypes.
    """
    # Operations are counted before compiling, as a compiled program's calls of libraries count
    # nothing and its loops count once, and for a platform that takes the default of each operation.
    lowered = function.trace(*arguments).lower(lowering_platforms=("rocm",))
    asked, found, memory = (
        lowered.cost_analysis(),
        compiled.cost_analysis(),
        compiled.memory_analysis(),
    )
    if not (asked and found and memory and "bytes accessed" in found):
        return None
    return Cost(
        flops=asked["flops"],
        traffic=found["bytes accessed"],
        needed=memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def measure(dtype: str, edge: int, megabytes: int) -> Peaks:
    """Measures this process's first device.

    Args:
      dtype: dtype of the product, at JAX's default precision, which the model has too.
      edge: rows and columns of each matrix.
      megabytes: size of the array that is copied.
    """
    # Random numbers, as constants draw less power and so compute faster; the scale keeps the size
    # of the products.
    matrix = (jax.random.normal(jax.random.key(0), (edge, edge)) * edge**-0.5).astype(dtype)
    size = megabytes * 2**20
    vector = jnp.zeros(size // 4, jnp.float32)
    # XLA would skip a plain copy, so 1 is added; in place, as a CPU loses time on new pages.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    return Peaks(
        flops=2 * edge**3 / _seconds(jax.jit(functools.partial(jnp.matmul, matrix)), matrix),
        bandwidth=2 * size / _seconds(copy, vector),
    )


def measure_elsewhere(dtype: str) -> Peaks:
    """Measures the device in another process, which frees all of its memory when it ends.

    Raises:
      subprocess.CalledProcessError: if the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.roofline", dtype]
    output = subprocess.check_output(command, text=True, env=environment("ours"))
    return Peaks(**json.loads(output))


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Returns the seconds of a call in a chain, where each call takes the result of the last."""
    x = jax.block_until_ready(function(x))
    turns = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            x = function(x)
        jax.block_until_ready(x)
        turns.append((time.perf_counter() - start) / CALLS)
    return min(turns)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(sys.argv[1], *SIZES[jax.default_backend()]))))
