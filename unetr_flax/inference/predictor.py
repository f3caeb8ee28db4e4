"""Windows to logits: jitted models, averaged over flips and over each other, on all devices."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unetr_flax import ops
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.runtime.aot import compile_in_background
from unetr_flax.runtime.compiler_options import compiler_options
from unetr_flax.runtime.cudnn import refuse_wrong_convolutions

# A CPU is given small windows together, up to so many voxels: a window of 16^3 then takes 0.4 of
# its time, one of 32^3 0.85, and larger ones gain nothing.
CPU_VOXELS = 2**16
# Others are given up to 4 windows, and fewer where these have more voxels than 4 windows of 160^3.
OTHERS_VOXELS = 2**24


def make_predict(
    model: nn.Module, platform: str | None = None
) -> Callable[[Any, jax.Array | np.ndarray], jax.Array]:
    """Builds the jitted `predict(variables, image [B, *img_size, C]) -> logits [B, *img_size, K]`.

    Norms use their running statistics and nothing is dropped, so the logits of a volume do not
    depend on the others in the batch.

    Args:
      model: a UNETR.
      platform: "cpu", "gpu" or "tpu", on which it will run; JAX's default if None.
    """
    platform = platform or jax.default_backend()
    apply = ops.target_platform(platform)(model.apply)
    return jax.jit(apply, compiler_options=compiler_options(platform))


def windows_per_device(platform: str, roi: Sequence[int]) -> int:
    """Returns how many windows a device is given at once.

    Args:
      platform: "cpu", "gpu" or "tpu".
      roi: voxels of a window per axis.
    """
    voxels = math.prod(roi)
    if platform != "cpu":
        return min(4, max(1, OTHERS_VOXELS // voxels))
    return max(1, CPU_VOXELS // voxels)


@dataclasses.dataclass(frozen=True)
class Weights:
    """One trained model.

    Attributes:
      cfg: its configuration.
      variables: its parameters and running statistics.
    """

    cfg: UNETRConfig
    variables: Any


class Predictor:
    """Computes the logits of windows, always with the same shapes and so by the same programs.

    The probabilities of several models and of flipped windows are averaged; the logits are then the
    logarithm of the mean. The programs are compiled in the background from the start on.

    Args:
      models: models of one window size, number of channels and number of classes.
      flips: spatial axes along which windows are flipped; all combinations are averaged.
      dtype: dtype of the computation; parameters are float32.
      devices: devices that share the windows.
      lowering: see `UNETR`.
      sigmoid: whether each output is a region with a probability of its own, instead of all
        together classes that exclude each other.

    Attributes:
      roi: voxels of the window per axis.
      in_channels: number of channels C.
      num_classes: number of classes K.
      batch_size: windows per call.
      device: the first device, which has the results.

    Raises:
      ValueError: if the models do not fit together, or a flip is none of their axes.
      CudnnError: if the devices are GPUs whose cuDNN computes wrong convolutions in this dtype.
    """

    def __init__(
        self,
        models: Sequence[Weights],
        *,
        flips: Iterable[int] = (),
        dtype: Any = jnp.float32,
        devices: Sequence[Any] | None = None,
        lowering: ops.Lowering = "auto",
        sigmoid: bool = False,
    ):
        first = models[0].cfg
        for other in models[1:]:
            for field in ("img_size", "in_channels", "out_channels"):
                if getattr(other.cfg, field) != getattr(first, field):
                    raise ValueError(
                        f"models to average: {field}={getattr(other.cfg, field)}, must be "
                        f"{getattr(first, field)} as the first one's"
                    )
        flips = sorted(set(flips))
        if not set(flips) <= set(range(first.spatial_rank)):
            raise ValueError(f"flips={flips}: must be axes 0 to {first.spatial_rank - 1}")
        devices = list(devices or jax.local_devices())
        self.device: Any = devices[0]
        platform = devices[0].platform
        if platform == "gpu":
            refuse_wrong_convolutions(dtype)
        self.roi = tuple(first.img_size)
        self.in_channels, self.num_classes = first.in_channels, first.out_channels
        self.batch_size = windows_per_device(platform, self.roi) * len(devices)
        self._sigmoid = sigmoid
        self._flips = [
            axes for n in range(len(flips) + 1) for axes in itertools.combinations(flips, n)
        ]
        mesh = Mesh(np.array(devices), ("windows",), axis_types=(AxisType.Auto,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("windows"))
        image = jax.ShapeDtypeStruct(
            (self.batch_size, *self.roi, first.in_channels), jnp.float32, sharding=self._split
        )
        self._programs = []
        for weights in models:
            variables = jax.device_put(weights.variables, everywhere)
            model = UNETR(weights.cfg, dtype=dtype, lowering=lowering, jit_blocks=True)
            program = compile_in_background(make_predict(model, platform), variables, image)
            self._programs.append((program, variables))

    def __call__(self, windows: np.ndarray) -> jax.Array:
        """Computes [batch_size, *roi, C] -> [batch_size, *roi, K], without waiting for it."""
        image = jax.device_put(np.asarray(windows, np.float32), self._split)
        if len(self._programs) == len(self._flips) == 1:
            program, variables = self._programs[0]
            return program(variables, image)
        shares = []
        for axes, (program, variables) in itertools.product(self._flips, self._programs):
            axes = tuple(axis + 1 for axis in axes)
            logits = program(variables, _flip(image, axes=axes) if axes else image)
            shares.append(probabilities_of(logits, axes=axes, sigmoid=self._sigmoid))
            # One sum of all before, so that no more than two are in memory.
            shares = [functools.reduce(_sum, shares)]
        count = len(self._flips) * len(self._programs)
        return logits_of_mean(shares[0], count=count, sigmoid=self._sigmoid)


def _flip(image: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    return jnp.flip(image, axes)


def probabilities_of(logits: jax.Array, *, axes: tuple[int, ...], sigmoid: bool) -> jax.Array:
    """Computes probabilities of logits, and flips them along some axes."""
    logits = logits.astype(jnp.float32)
    return jnp.flip(jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1), axes)


def _sum(total: jax.Array, share: jax.Array) -> jax.Array:
    return total + share


def logits_of_mean(total: jax.Array, *, count: int, sigmoid: bool) -> jax.Array:
    """Computes finite logits of the mean of `count` arrays of probabilities, from their sum."""
    # Without a floor the logit of an impossible class were minus infinity, which has no mean.
    mean = jnp.maximum(total / count, jnp.finfo(jnp.float32).tiny)
    if not sigmoid:
        return jnp.log(mean)
    # Half an epsilon below 1 is the largest number that a region's probability can be.
    mean = jnp.minimum(mean, 1 - jnp.finfo(jnp.float32).epsneg)
    return jnp.log(mean) - jnp.log1p(-mean)


_flip = jax.jit(_flip, static_argnames="axes")
probabilities_of = jax.jit(probabilities_of, static_argnames=("axes", "sigmoid"))
_sum = jax.jit(_sum, donate_argnums=0)
logits_of_mean = jax.jit(logits_of_mean, static_argnames=("count", "sigmoid"), donate_argnums=0)
