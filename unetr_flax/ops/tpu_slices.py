"""Which slices of a volume are the samples of a 2D convolution on TPU.

Where channels are few, the TPU's compiler lays samples along the lanes of its registers, and pads
them to whole registers. Slices along depth are too few for that where devices share a volume, so
slices along another axis take their place.
"""

import jax

LANES = 128


def axis_of_slices(x: jax.Array) -> int:
    """Returns the axis of [N, D, H, W, C] along which slices are padded least; depth if all are.

    The batch does not count, as it may be empty or of symbolic size.
    """

    def padding(axis):
        slices = x.shape[axis]
        return -(-slices // LANES) * LANES / slices

    return min((1, 2, 3), key=padding)


def turned(x: jax.Array, axis: int) -> jax.Array:
    """Exchanges depth and another axis of [N, D, H, W, C]; twice is none."""
    return x.swapaxes(1, axis)


def kernel_turned(kernel: jax.Array, axis: int) -> jax.Array:
    """Exchanges the axes of a kernel [KD, KH, KW, I, O] that belong to those of volumes."""
    return kernel.swapaxes(0, axis - 1)
