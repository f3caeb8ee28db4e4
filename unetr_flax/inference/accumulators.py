"""Weighted sums of windows, on the host or on the device, that become logits of a volume."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Place = Literal["auto", "device", "host"]

# Share of a device's free memory that sums may take.
FREE_SHARE = 0.5


class Accumulator(Protocol):
    """Sums of windows over a part of a volume that can move along the first spatial axis."""

    def add(
        self, starts: Sequence[tuple[int, ...] | None], outputs: jax.Array | np.ndarray
    ) -> None:
        """Adds outputs of a batch of windows.

        Args:
          starts: first voxel of each window in the part, (volume, *spatial); None for outputs that
            are not added. Outputs beyond `starts` are not added either.
          outputs: [b, *roi, K].
        """
        ...

    def means(self, start: int, length: int) -> np.ndarray:
        """Returns the weighted means of some planes, [B, length, ..., K]; once for each plane."""
        ...

    def advance(self, length: int) -> None:
        """Moves the part beyond its first planes; what it newly covers is zero."""
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
        needed = int(np.prod(shape)) * (channels + 1) * dtype.itemsize
        fits = isinstance(outputs, jax.Array) and fits_on(first_device(outputs), needed)
        place = "device" if fits else "host"
    kind = HostAccumulator if place == "host" else DeviceAccumulator
    return kind(shape, channels, importance.astype(dtype))


def first_device(array: jax.Array) -> Any:
    """Returns the first of the devices that hold an array."""
    return min(array.devices(), key=lambda device: device.id)


def fits_on(device: Any, needed: int) -> bool:
    """Tells whether a device is an accelerator with memory to spare for as many bytes."""
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

    def add(
        self, starts: Sequence[tuple[int, ...] | None], outputs: jax.Array | np.ndarray
    ) -> None:
        """Adds windows, see `Accumulator`; what lies outside the part is left out."""
        for start, logits in zip(starts, np.asarray(outputs), strict=False):
            if start is None:
                continue
            window, inside = [], []
            sizes = self._weight.shape[1:-1], self._importance.shape[:-1]
            for first, size, length in zip(start[1:], *sizes, strict=True):
                low, high = max(first, 0), min(first + length, size)
                window.append(slice(low, max(low, high)))
                inside.append(slice(low - first, max(low, high) - first))
            total = self._total[start[0]][tuple(window)]
            weight = self._weight[start[0]][tuple(window)]
            importance, logits = self._importance[tuple(inside)], logits[tuple(inside)]
            weight += importance
            # Plane by plane, so that products stay in the processor's cache.
            for plane, found, scale in zip(total, logits, importance, strict=True):
                plane += found if self._constant else found * scale

    def means(self, start: int, length: int) -> np.ndarray:
        """Returns planes, see `Accumulator`; they are valid until the part moves."""
        planes = self._total[:, start : start + length]
        planes /= self._weight[:, start : start + length]
        return planes

    def advance(self, length: int) -> None:
        """Moves the part, see `Accumulator`."""
        for sums in (self._total, self._weight):
            for i in range(length, sums.shape[1]):
                sums[:, i - length] = sums[:, i]
            sums[:, max(sums.shape[1] - length, 0) :] = 0


class DeviceAccumulator:
    """Sums in the memory of the device that computes the windows; the host never waits for it."""

    def __init__(self, shape: Sequence[int], channels: int, importance: np.ndarray):
        self._shape, self._channels, self._given = tuple(shape), channels, importance
        self._sums: tuple[jax.Array, jax.Array] | None = None
        self._importance: jax.Array | None = None

    def add(
        self, starts: Sequence[tuple[int, ...] | None], outputs: jax.Array | np.ndarray
    ) -> None:
        """Adds windows, see `Accumulator`; they must lie within the part."""
        if self._sums is None:
            on_device = isinstance(outputs, jax.Array)
            self._device = first_device(outputs) if on_device else jax.devices()[0]
            self._importance = jax.device_put(self._given[..., None], self._device)
            total, weight = (
                jnp.zeros((*self._shape, n), self._given.dtype, device=self._device)
                for n in (self._channels, 1)
            )
            self._sums = total, weight
        corners = np.zeros((len(outputs), len(self._shape)), np.int32)
        added = np.zeros(len(outputs), bool)
        for i, start in enumerate(starts):
            if start is not None:
                corners[i], added[i] = start, True
        # Of several devices, the first one adds up.
        outputs = jax.device_put(outputs, self._device)
        self._sums = _add_windows(*self._sums, outputs, self._importance, corners, added)

    def means(self, start: int, length: int) -> np.ndarray:
        """Returns planes, see `Accumulator`."""
        assert self._sums is not None
        return np.asarray(_means(*self._sums, start, length=length))

    def advance(self, length: int) -> None:
        """Moves the part, see `Accumulator`."""
        assert self._sums is not None
        self._sums = _advance(*self._sums, length=length)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add_windows(total, weight, outputs, importance, corners, added):
    for i in range(len(outputs)):
        scale = importance[None] * added[i].astype(importance.dtype)
        corner = [*corners[i], 0]

        def add(sums, shares, corner=corner):
            there = lax.dynamic_slice(sums, corner, shares.shape)
            return lax.dynamic_update_slice(sums, there + shares, corner)

        total = add(total, outputs[i][None].astype(total.dtype) * scale)
        weight = add(weight, scale)
    return total, weight


@functools.partial(jax.jit, static_argnames="length")
def _means(total, weight, start, *, length):
    return lax.dynamic_slice_in_dim(total, start, length, 1) / lax.dynamic_slice_in_dim(
        weight, start, length, 1
    )


@functools.partial(jax.jit, static_argnames="length", donate_argnums=(0, 1))
def _advance(total, weight, *, length):
    def move(sums):
        return jnp.concatenate([sums[:, length:], jnp.zeros_like(sums[:, :length])], axis=1)

    return move(total), move(weight)
