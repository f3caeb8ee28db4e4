"""The 3x3x3 convolution on TPU in slabs along depth, so that large intermediates never exist whole.

A slab is some slices of every volume, since each device may hold some of the volumes. The input is
normalized, up-sampled, concatenated and given its neighbors' channels one slab at a time: for whole
volumes these arrays would take several times the memory of input and result together. The numbers
are the same.

A slab has few slices. A TPU pads the results of a convolution of few samples and few features to
many times their size, so the columns of a slab take the place of the samples here: the column taps
are concatenated to the channels, and a 2D convolution along depth and height remains.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv3x3x3.operands import AnyOperands, Operands, mirrored
from unetr_flax.ops.conv3x3x3.tpu_layout import compact
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample
from unetr_flax.ops.upsample.api import upsample

# Bytes of one volume's slab with its neighbors' channels; smaller volumes need no slabs.
SLAB_BYTES = 2**28


def slab_size(operands: AnyOperands) -> int | None:
    """Returns the slices per slab, a divisor of the depth; None if a volume is small enough."""
    _, depth, h, w = operands.grid
    inputs, features = operands.kernel.shape[-2:]
    slice_bytes = 3 * h * w * max(inputs, features) * operands.kernel.dtype.itemsize
    if depth * slice_bytes <= SLAB_BYTES:
        return None
    # A slab is up-sampled from whole slices.
    step = 1 if operands.up is None else operands.up.kernel.shape[0]
    sizes = [size for size in range(step, depth + 1, step) if depth % size == 0]
    return max((size for size in sizes if size * slice_bytes <= SLAB_BYTES), default=sizes[0])


def forward(operands: AnyOperands, size: int, *, precision: lax.PrecisionLike) -> jax.Array:
    """Computes [N, D, H, W, O], `size` slices at a time."""
    x, up, kernel, bias = operands
    n, depth, *rest = operands.grid

    def of_slab(start):
        y = _conv(_taps(_input_slab(x, up, start, size)), kernel, precision)
        return compact(y if bias is None else y + bias)

    y = lax.map(of_slab, jnp.arange(0, depth, size))
    return _whole(y, (n, depth, *rest, kernel.shape[-1]))


def backward(
    operands: AnyOperands, grad: jax.Array, size: int, *, precision: lax.PrecisionLike
) -> AnyOperands:
    """Computes the gradients of the operands, `size` slices at a time."""
    x, up, kernel, bias = operands
    own = 0 if x is None else x.shape[-1]
    back_kernel = mirrored(kernel)
    wide = at_least_float32(grad.dtype)
    smalls = (kernel, bias, None if up is None else (up.kernel, up.bias))
    zeros = jax.tree.map(lambda small: jnp.zeros(small.shape, wide), smalls)

    def of_slab(totals, start):
        grad_slab = _with_neighbors(grad, start, size)
        inner = grad_slab[:, 1:-1]
        taps = _taps(_input_slab(x, up, start, size))
        kernel_grad = _kernel_grad(taps, inner, precision, wide)
        x_grad = compact(_conv(_taps(grad_slab), back_kernel, precision))
        bias_grad = None if bias is None else inner.astype(wide).sum((0, 1, 2, 3))
        coarse_grad, up_grads = None, None
        if up is not None:
            coarse_grad, *up_grads = _upsampled_grad(up, x_grad[..., own:], start, size, wide)
            up_grads = tuple(up_grads)
        totals = jax.tree.map(jnp.add, totals, (kernel_grad, bias_grad, up_grads))
        return totals, (x_grad[..., :own] if own else None, coarse_grad)

    starts = jnp.arange(0, grad.shape[1], size)
    totals, (x_grad, coarse_grad) = lax.scan(of_slab, zeros, starts)
    kernel_grad, bias_grad, up_grads = jax.tree.map(
        lambda total, small: total.astype(small.dtype), totals, smalls
    )
    up_grad = None
    if up is not None:
        up_kernel_grad, up_bias_grad = up_grads
        coarse_grad = _whole(coarse_grad, up.x.shape)
        up_grad = DeferredUpsample(coarse_grad, up_kernel_grad, up_bias_grad, up.precision)
    if x is not None:
        x_grad = _whole(x_grad, x.shape)
        if isinstance(x, DeferredNorm):
            x_grad = jax.vjp(DeferredNorm.array, x)[1](x_grad.astype(x.dtype))[0]
    return Operands(x_grad, up_grad, kernel_grad, bias_grad)


def _whole(slabs, shape):
    """Reshapes the stacked slabs of a loop to volumes.

    Without the barrier the compiler widens the slabs before it reshapes them, and keeps both.
    """
    return lax.optimization_barrier(jnp.moveaxis(slabs, 0, 1).reshape(shape))


def _input_slab(x, up, start, size):
    """Computes all channels of a slab and the slices around it, [N, size + 2, H, W, I]."""
    found = [] if x is None else [_own(x, start, size)]
    if up is not None:
        found.append(_upsampled(up, start, size))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def _own(x, start, size):
    """Computes the channels that are not up-sampled, as `_input_slab`."""
    if not isinstance(x, DeferredNorm):
        return _with_neighbors(x, start, size)
    y = x.replace(x=_with_neighbors(x.x, start, size)).array()
    # A norm would turn the zeros around a volume into other numbers.
    return jnp.where(_inside(start, size, x.shape[1]), y, jnp.zeros_like(y))


def _inside(start, size, depth):
    """Tells which of a slab's slices and neighbors are in the volume, [size + 2, 1, 1, 1]."""
    index = start + jnp.arange(-1, size + 1)
    return ((index >= 0) & (index < depth)).reshape(-1, 1, 1, 1)


def _with_neighbors(x, start, size):
    """Returns slices start - 1 to start + size of [N, D, ...], with zeros around the volumes."""
    depth = x.shape[1]
    before = lax.dynamic_slice_in_dim(x, jnp.maximum(start - 1, 0), 1, axis=1)
    after = lax.dynamic_slice_in_dim(x, jnp.minimum(start + size, depth - 1), 1, axis=1)
    slab = lax.dynamic_slice_in_dim(x, start, size, axis=1)
    zero = jnp.zeros_like(before)
    before = jnp.where(start == 0, zero, before)
    after = jnp.where(start + size == depth, zero, after)
    return jnp.concatenate([before, compact(slab), after], axis=1)


def _upsampled(up, start, size):
    """Computes the up-sampled channels, as `_input_slab`."""
    step = up.kernel.shape[0]
    coarse = _with_neighbors(up.x, start // step, size // step)
    fine = upsample(coarse, up.kernel, up.precision, None)
    fine = fine[:, step - 1 : fine.shape[1] - step + 1]
    if up.bias is None:
        return fine
    fine = fine + up.bias
    # The bias must not reach the zeros around a volume.
    return jnp.where(_inside(start, size, up.shape[1]), fine, jnp.zeros_like(fine))


def _upsampled_grad(up, grad, start, size, wide):
    """Computes the gradients of a slab's coarse slices, of the kernel and of the bias."""
    step = up.kernel.shape[0]
    coarse = lax.dynamic_slice_in_dim(up.x, start // step, size // step, axis=1)

    def product(x, kernel):
        return upsample(x, kernel, up.precision, None)

    x_grad, kernel_grad = jax.vjp(product, coarse, up.kernel)[1](grad)
    bias_grad = None if up.bias is None else grad.astype(wide).sum((0, 1, 2, 3))
    return x_grad, kernel_grad.astype(wide), bias_grad


def _taps(slab):
    """Gives columns their two neighbors' channels: [N, B, H, W, I] -> [N, B, H, W, 3 I]."""
    width = slab.shape[3]
    slab = jnp.pad(slab, ((0, 0), (0, 0), (0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([slab[..., tap : tap + width, :] for tap in range(3)], axis=-1)


def _conv(taps, kernel, precision):
    """Computes [N, size + 2, H, W, 3 I], [3, 3, 3, I, O] -> [N, size, H, W, O]."""
    n, *_, width, _ = taps.shape
    columns = (2, 3, 0, 1)
    y = lax.conv_general_dilated(
        _columns(taps),
        kernel.reshape(3, 3, -1, kernel.shape[-1]),
        window_strides=(1, 1),
        padding=((0, 0), (1, 1)),
        dimension_numbers=lax.ConvDimensionNumbers(columns, (3, 2, 0, 1), columns),
        precision=precision,
    )
    return jnp.moveaxis(y.reshape(*y.shape[:2], n, width, -1), 2, 0)


def _kernel_grad(taps, grad, precision, wide):
    """Computes [N, size + 2, H, W, 3 I], [N, size, H, W, O] -> [3, 3, 3, I, O]."""
    y = lax.conv_general_dilated(
        _columns(taps),
        _columns(grad),
        window_strides=(1, 1),
        padding=((0, 0), (1, 1)),
        dimension_numbers=lax.ConvDimensionNumbers((3, 2, 0, 1), (3, 2, 0, 1), (2, 3, 0, 1)),
        precision=precision,
        preferred_element_type=wide,
    )
    return y.reshape(3, 3, 3, -1, grad.shape[-1])


def _columns(slab):
    """Merges the columns of all volumes into one axis: [N, B, H, W, C] -> [B, H, N W, C]."""
    slab = jnp.moveaxis(slab, 0, 2)
    return slab.reshape(*slab.shape[:2], -1, slab.shape[-1])
