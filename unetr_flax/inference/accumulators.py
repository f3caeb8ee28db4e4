"""Weighted sums of windows, on the host or on the device, that become logits of a volume."""

import functools
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Place = Literal["auto", "device", "host"]

# Share of a device's free memory that sums may take.
FREE_SHARE = 0.5


class Accumulator(Protocol):
    """Sums of windows over a part of a volume that can move along the first spatial axis."""

    def add(self, starts: Sequence[tuple[int, ...]], outputs: jax.Array | np.ndarray) -> None:
        """Adds the first `len(starts)` of a batch of outputs.

        Args:
          starts: first voxel of each window, (volume, *spatial), in the part.
          outputs: [b, *roi, K]; those beyond `starts` only fill the batch up.
        """
        ...

    def take(self, length: int) -> np.ndarray:
        """Returns the weighted means [B, length, ..., K] of the first planes and moves beyond."""
        ...


def make_accumulator(
    place: Place, shape: Sequence[int], importance: np.ndarray, outputs: jax.Array | np.ndarray
) -> Accumulator:
    """Chooses where windows are summed.

    With "auto" that is the device which computed the outputs, if it is not the CPU and sums and
    weights take at most half of its free memory, and the host otherwise: a GPU would wait for the
    host to add up windows, while on CPU both are the same memory.

    Args:
      place: "auto", "device" or "host".
      shape: volumes and voxels of the part, (B, *spatial).
      importance: weight of each voxel of a window, [*roi].
      outputs: a first batch of outputs, which tells the dtype and number of channels.

    Raises:
      ValueError: if the place is unknown.
    """
    if place not in ("auto", "device", "host"):
        raise ValueError(f'accumulate={place!r}: must be "auto", "device" or "host"')
    dtype = np.promote_types(outputs.dtype, np.float32)
    channels = outputs.shape[-1]
    if place == "auto":
        numbers = int(np.prod(shape)) * (channels + 1)
        place = "device" if _fits(outputs, numbers * dtype.itemsize) else "host"
    kind = HostAccumulator if place == "host" else DeviceAccumulator
    return kind(shape, channels, importance.astype(dtype))


def _fits(outputs: jax.Array | np.ndarray, needed: int) -> bool:
    """Tells whether an accelerator computed the outputs and has memory for as many bytes."""
    if not isinstance(outputs, jax.Array):
        return False
    device = min(outputs.devices(), key=lambda device: device.id)
    if device.platform == "cpu":
        return False
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return needed <= FREE_SHARE * free


class HostAccumulator:
    """Sums in the memory of the host, by NumPy."""

    def __init__(self, shape: Sequence[int], channels: int, importance: np.ndarray):
        self._importance = importance[..., None]
        self._total = np.zeros((*shape, channels), importance.dtype)
        self._weight = np.zeros((*shape, 1), importance.dtype)
        self._constant = bool((importance == 1).all())

    def add(self, starts: Sequence[tuple[int, ...]], outputs: jax.Array | np.ndarray) -> None:
        """Adds windows, see `Accumulator`."""
        roi = self._importance.shape[:-1]
        for (volume, *start), logits in zip(starts, np.asarray(outputs), strict=False):
            window = tuple(slice(s, s + r) for s, r in zip(start, roi, strict=True))
            self._total[volume][window] += logits if self._constant else logits * self._importance
            self._weight[volume][window] += self._importance

    def take(self, length: int) -> np.ndarray:
        """Takes planes, see `Accumulator`."""
        planes = self._total[:, :length]
        planes /= self._weight[:, :length]
        if length == self._total.shape[1]:
            return planes
        planes = planes.copy()
        for sums in (self._total, self._weight):
            sums[:, :-length] = sums[:, length:]
            sums[:, -length:] = 0
        return planes


class DeviceAccumulator:
    """Sums in the memory of the device that computes the windows; the host never waits for it."""

    def __init__(self, shape: Sequence[int], channels: int, importance: np.ndarray):
        self._shape, self._channels, self._given = tuple(shape), channels, importance
        self._sums: tuple[jax.Array, jax.Array] | None = None
        self._importance: jax.Array | None = None

    def add(self, starts: Sequence[tuple[int, ...]], outputs: jax.Array | np.ndarray) -> None:
        """Adds windows, see `Accumulator`."""
        if self._sums is None:
            devices = outputs.devices() if isinstance(outputs, jax.Array) else jax.devices()[:1]
            self._device = min(devices, key=lambda device: device.id)
            self._importance = jax.device_put(self._given[..., None], self._device)
            self._sums = self._zeros()
        filled = np.zeros((len(outputs), len(self._shape)), np.int32)
        filled[: len(starts)] = starts
        counts = np.arange(len(outputs)) < len(starts)
        # Of several devices, the first one sums.
        outputs = jax.device_put(outputs, self._device)
        self._sums = _add_windows(*self._sums, outputs, self._importance, filled, counts)

    def take(self, length: int) -> np.ndarray:
        """Takes planes, see `Accumulator`."""
        assert self._sums is not None
        planes, *sums = _take_planes(*self._sums, length=length)
        self._sums = (sums[0], sums[1])
        return np.asarray(planes)

    def _zeros(self) -> tuple[jax.Array, jax.Array]:
        shapes = [(*self._shape, channels) for channels in (self._channels, 1)]
        total, weight = (
            jnp.zeros(shape, self._given.dtype, device=self._device) for shape in shapes
        )
        return total, weight


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add_windows(total, weight, outputs, importance, starts, counts):
    for i in range(len(outputs)):
        scale = importance[None] * counts[i].astype(importance.dtype)
        start = [*starts[i], 0]
        for_window = []
        for sums, shares in ((total, outputs[i][None] * scale), (weight, scale)):
            there = lax.dynamic_slice(sums, start, shares.shape)
            for_window.append(
                lax.dynamic_update_slice(sums, there + shares.astype(sums.dtype), start)
            )
        total, weight = for_window
    return total, weight


@functools.partial(jax.jit, static_argnames="length", donate_argnums=(0, 1))
def _take_planes(total, weight, *, length):
    planes = total[:, :length] / weight[:, :length]

    def move(sums):
        return jnp.concatenate([sums[:, length:], jnp.zeros_like(sums[:, :length])], axis=1)

    return planes, move(total), move(weight)
