"""Command line: `python -m benchmarks.device_parity` compares a device with the CPU.

Logits and gradients of a small model are computed on CPU by plain definitions in float64 and in a
narrower dtype, and on the device in that dtype by the device's own lowering. The device's errors
must be of the size of the CPU's. A fault in this project's lowering or in a library gives far
larger errors. In float64, which TPUs lack, the device must agree with the CPU to 1e-10.

Each comparison is of several random draws of weights and inputs, and is judged by the worst of
them. Only gradients in float32 are judged by the best: one activation that rounds to the other side
of zero changes them by 1e-4, on any device, which happens in some draws. float64 has room enough
for that, and in bfloat16 all sides have many. A fault is in all draws.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import environment
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.ops import Lowering
from unetr_flax.runtime.cudnn import CudnnError, refuse_wrong_convolutions

# The device's error may be larger than the CPU's by this factor; below the floor it is rounding.
FACTOR = 4
FLOOR = {"float64": 1e-10, "float32": 1e-6, "bfloat16": 1e-2}
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """Relative error |a - b| / |b| of logits or of all gradients against float64.

    Attributes:
      what: "logits" or "gradients".
      dtype: dtype of the computation; products have the highest precision.
      device: the error on the device, the worst or best of all draws.
      cpu: the error of the plain definitions on CPU, the worst or best of all draws.
    """

    what: str
    dtype: str
    device: float
    cpu: float

    @property
    def holds(self) -> bool:
        """True if the device's rounding is comparable to the CPU's."""
        return self.device <= max(FACTOR * self.cpu, FLOOR[self.dtype])

    def __str__(self) -> str:
        return (
            f"{self.what}, {self.dtype}: {self.device:.1e} on the device, {self.cpu:.1e} on CPU, "
            f"{'holds' if self.holds else 'DOES NOT HOLD'}"
        )


def compare(device: jax.Device, dtypes: tuple[str, ...], **sizes: Any) -> list[Row]:
    """Compares a device with the CPU.

    Args:
      device: the device.
      dtypes: dtypes to compare in, among "float64", "float32" and "bfloat16".
      **sizes: arguments of `UNETRConfig.reference` in place of the defaults.

    Raises:
      CudnnError: if this machine's cuDNN is known to compute wrongly in one of the dtypes.
    """
    for dtype in dtypes:
        refuse_wrong_convolutions(dtype)
    cfg = UNETRConfig.reference(
        **{"img_size": (16, 32, 48), "in_channels": 1, "out_channels": 4, "num_layers": 4} | sizes
    )
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True):
        draws = [_draw(cfg, seed) for seed in range(DRAWS)]
        exact = _run(cfg, draws, cpu, "float64", "xla")
        rows = []
        for dtype in dtypes:
            there = _run(cfg, draws, device, dtype, "auto")
            here = exact if dtype == "float64" else _run(cfg, draws, cpu, dtype, "xla")
            for i, what in enumerate(("logits", "gradients")):
                # Unlike Python's, numpy's keep nan wherever it is.
                judged = np.min if (what, dtype) == ("gradients", "float32") else np.max
                errors = [
                    float(judged([_error(a[i], b[i]) for a, b in zip(found, exact, strict=True)]))
                    for found in (there, here)
                ]
                rows.append(Row(what, dtype, *errors))
    return rows


def _draw(cfg: UNETRConfig, seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Draws variables, a batch of images, and the weights of the sum that is differentiated.

    A loss in place of the weighted sum would subtract numbers that are close.
    """
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((2, *cfg.img_size, cfg.in_channels))
    weights = rng.standard_normal((2, *cfg.img_size, cfg.out_channels))
    shapes = abstract_variables(UNETR(cfg))
    return jax.tree.map(lambda leaf: _random(rng, leaf.shape), shapes), image, weights


def _run(
    cfg: UNETRConfig,
    draws: list[tuple[Any, np.ndarray, np.ndarray]],
    device: jax.Device,
    dtype: str,
    lowering: Lowering,
) -> list[tuple[np.ndarray, Any]]:
    """Computes the logits and the gradients of each draw on a device; float64 on the host."""
    narrow = jnp.float64 if dtype == "float64" else jnp.float32
    model = UNETR(
        cfg, dtype=jnp.dtype(dtype), param_dtype=narrow, lowering=lowering, jit_blocks=True
    )

    @jax.jit
    def compute(variables, image, weights):
        def weighted_sum(params):
            logits = model.apply({**variables, "params": params}, image)
            return (logits.astype(narrow) * weights).sum(), logits

        grads, logits = jax.grad(weighted_sum, has_aux=True)(variables["params"])
        return logits, grads

    found = []
    for draw in draws:
        given = jax.device_put(jax.tree.map(narrow, draw), device)
        with jax.default_matmul_precision("highest"):
            result = compute(*given)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), result))
    return found


def compare_elsewhere(dtype: str) -> list[Row]:
    """Compares this machine's first device with the CPU, in another process.

    Args:
      dtype: dtype that will be timed; float64 and float32 are compared in any case.

    Raises:
      CudnnError: see `compare`.
      subprocess.CalledProcessError: if the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.device_parity", "--json", dtype]
    answer = json.loads(subprocess.check_output(command, text=True, env=environment("ours")))
    if isinstance(answer, str):
        raise CudnnError(answer)
    return [Row(**row) for row in answer]


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws parameters that keep the scale of their inputs; vectors and variances are about 1."""
    if len(shape) < 2:
        return 1 + 0.1 * np.abs(rng.standard_normal(shape))
    return rng.standard_normal(shape) * np.prod(shape[:-1]) ** -0.5


def _error(found: Any, truth: Any) -> float:
    """Computes |a - b| / |b| of all arrays as one vector."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    difference, size = np.sum([(np.sum((a - b) ** 2), np.sum(b**2)) for a, b in pairs], axis=0)
    return float(np.sqrt(difference / size))


def main(args: list[str]) -> int:
    """Runs the command; returns 0, or 1 if the device computes something else."""
    as_json = "--json" in args
    wanted = [arg for arg in args if arg != "--json"] or ["bfloat16"]
    device = jax.devices()[0]
    always = ["float32"] if device.platform == "tpu" else ["float64", "float32"]
    try:
        rows = compare(device, tuple(dict.fromkeys([*always, *wanted])))
    except CudnnError as error:
        print(json.dumps(str(error)) if as_json else error)
        return 0 if as_json else 1
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    for row in rows:
        print(row)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
