"""What a device can do at most, measured on it, and what a program asks of it.

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

# Edge of the product and megabytes of the copy that show a device's limits.
SIZES = {"cpu": (2048, 256), "gpu": (8192, 2048), "tpu": (8192, 2048)}
TURNS, CALLS = 5, 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA counts in a program.

    Attributes:
      flops: operations that the model takes, a multiplication and an addition being two; as it is
        written, not as it is lowered, so that tricks earn nothing.
      traffic: bytes that the compiled program's operations read and write, fused ones' once.
      needed: bytes of arguments, results and intermediate results, donated ones once.
    """

    flops: float
    traffic: float
    needed: int


@dataclasses.dataclass(frozen=True)
class Peaks:
    """A device's limits.

    Attributes:
      flops: operations per second of a product of large square matrices.
      bandwidth: bytes per second, read and written, of a copy that fits no cache.
    """

    flops: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """What a program takes at least."""
        return max(cost.flops / self.flops, cost.traffic / self.bandwidth)


def cost_of(function: jax.stages.Wrapped, compiled: jax.stages.Compiled, *arguments) -> Cost | None:
    """A jitted function's cost for arguments; None where this platform's XLA does not tell.

    Args:
      function: the function.
      compiled: the same, compiled for these arguments.
      *arguments: arrays, or their shapes and dtypes.
    """
    # For a platform that gets the default of each operation that is lowered by platform. Compiled,
    # calls of libraries count nothing and loops count once.
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
      dtype: of the product, whose sums are float32; at JAX's default precision, as the model's.
      edge: rows and columns of each matrix.
      megabytes: of what is copied.
    """
    # Of a size that products keep; what is constant draws less power, and is faster for it.
    matrix = (jax.random.normal(jax.random.key(0), (edge, edge)) * edge**-0.5).astype(dtype)
    size = megabytes * 2**20
    vector = jnp.zeros(size // 4, jnp.float32)
    # A sum, as XLA would return what is merely copied; in place, as new pages cost a CPU more.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    return Peaks(
        flops=2 * edge**3 / _seconds(jax.jit(functools.partial(jnp.matmul, matrix)), matrix),
        bandwidth=2 * size / _seconds(copy, vector),
    )


def measure_elsewhere(dtype: str) -> Peaks:
    """The peaks, measured in a process of its own, which leaves the device as it was.

    Raises:
      subprocess.CalledProcessError: if it fell over.
    """
    command = [sys.executable, "-m", "benchmarks.roofline", dtype]
    output = subprocess.check_output(command, text=True, env=environment("ours"))
    return Peaks(**json.loads(output))


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of a call among calls that wait for one another only."""
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
