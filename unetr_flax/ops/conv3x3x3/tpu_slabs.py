"""The 3x3x3 convolution on TPU, slab by slab along depth: what is large is never there at once.

A slab is some slices of every volume, as devices may have some volumes each. Of a slab the parts of
the input are normalized, up-sampled, joined and given their neighbors' channels, all of which
would be several times the input and the result together. The numbers are the same.

A slab has few slices. A TPU lays out the results of a convolution of few samples and few features
with many times their size of padding, so the columns of a slab are the samples here: the column
taps join the channels, and what is left is a 2D convolution along depth and height.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.conv3x3x3.operands import Operands, mirrored
from unetr_flax.ops.conv3x3x3.tpu_layout import compact
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample
from unetr_flax.ops.upsample.api import upsample

# Bytes of a volume's slab with its neighbors' channels; what has no more needs no slabs.
SLAB_BYTES = 2**28


def slab_size(operands: Operands) -> int | None:
    """Slices per slab, a divisor of the depth; None if a volume is small enough."""
    shape = (operands.up if operands.x is None else operands.x).shape
    _, depth, h, w, _ = shape
    inputs, features = operands.kernel.shape[-2:]
    slice_bytes = 3 * h * w * max(inputs, features) * operands.kernel.dtype.itemsize
    if depth * slice_bytes <= SLAB_BYTES:
        return None
    # A slab is up-sampled from whole slices.
    step = 1 if operands.up is None else operands.up.kernel.shape[0]
    sizes = [size for size in range(step, depth + 1, step) if depth % size == 0]
    return max((size for size in sizes if size * slice_bytes <= SLAB_BYTES), default=sizes[0])


def forward(operands: Operands, size: int, *, precision: lax.PrecisionLike) -> jax.Array:
    """[N, D, H, W, O], `size` slices at a time."""
    x, up, kernel, bias = operands
    n, depth, *rest, _ = (up if x is None else x).shape

    def of_slab(start):
        y = _conv(_taps(_joined(x, up, start, size)), kernel, precision)
        return compact(y if bias is None else y + bias)

    y = lax.map(of_slab, jnp.arange(0, depth, size))
    return _whole(y, (n, depth, *rest, kernel.shape[-1]))


def backward(
    operands: Operands, grad: jax.Array, size: int, *, precision: lax.PrecisionLike
) -> Operands:
    """The gradients of the operands, `size` slices at a time."""
    x, up, kernel, bias = operands
    own = 0 if x is None else x.shape[-1]
    back_kernel = mirrored(kernel)
    wide = at_least_float32(grad.dtype)
    smalls = (kernel, bias, None if up is None else (up.kernel, up.bias))
    zeros = jax.tree.map(lambda small: jnp.zeros(small.shape, wide), smalls)

    def of_slab(totals, start):
        grad_slab = _with_neighbors(grad, start, size)
        inner = grad_slab[:, 1:-1]
        taps = _taps(_joined(x, up, start, size))
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
        up_grad = DeferredUpsample(_whole(coarse_grad, up.x.shape), *up_grads, up.precision)
    if x is not None:
        x_grad = _whole(x_grad, x.shape)
    if isinstance(x, DeferredNorm):
        x_grad = jax.vjp(DeferredNorm.array, x)[1](x_grad.astype(x.dtype))[0]
    return Operands(
        x_grad,
        up_grad,
        kernel_grad,
        bias_grad,
    )


def _whole(slabs, shape):
    """All slabs of a loop's result, in the shape of volumes.

    Without the barrier the compiler widens them before it reshapes them, and that it keeps.
    """
    return lax.optimization_barrier(jnp.moveaxis(slabs, 0, 1).reshape(shape))


def _joined(x, up, start, size):
    """All channels of a slab and of the slices before and after it: [N, size + 2, H, W, I]."""
    found = [] if x is None else [_own(x, start, size)]
    if up is not None:
        found.append(_upsampled(up, start, size))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def _own(x, start, size):
    """Of what is not up-sampled."""
    if not isinstance(x, DeferredNorm):
        return _with_neighbors(x, start, size)
    y = x.replace(x=_with_neighbors(x.x, start, size)).array()
    # What the norm makes of the zeros around a volume is none.
    return jnp.where(_inside(start, size, x.shape[1]), y, jnp.zeros_like(y))


def _inside(start, size, depth):
    """Which of a slab's slices and neighbors are in the volume, [size + 2, 1, 1, 1]."""
    index = start + jnp.arange(-1, size + 1)
    return ((index >= 0) & (index < depth)).reshape(-1, 1, 1, 1)


def _with_neighbors(x, start, size):
    """Slices start - 1 to start + size of [N, D, ...], with zeros around the volumes."""
    depth = x.shape[1]
    before = lax.dynamic_slice_in_dim(x, jnp.maximum(start - 1, 0), 1, axis=1)
    after = lax.dynamic_slice_in_dim(x, jnp.minimum(start + size, depth - 1), 1, axis=1)
    slab = lax.dynamic_slice_in_dim(x, start, size, axis=1)
    zero = jnp.zeros_like(before)
    before = jnp.where(start == 0, zero, before)
    after = jnp.where(start + size == depth, zero, after)
    return jnp.concatenate([before, compact(slab), after], axis=1)


def _upsampled(up, start, size):
    """The same of what is up-sampled first."""
    step = up.kernel.shape[0]
    coarse = _with_neighbors(up.x, start // step, size // step)
    fine = upsample(coarse, up.kernel, up.precision, None)
    fine = fine[:, step - 1 : fine.shape[1] - step + 1]
    if up.bias is None:
        return fine
    fine = fine + up.bias
    # There is no bias around a volume.
    return jnp.where(_inside(start, size, up.shape[1]), fine, jnp.zeros_like(fine))


def _upsampled_grad(up, grad, start, size, wide):
    """Gradients of a slab's coarse slices, of the kernel and of the bias."""
    step = up.kernel.shape[0]
    coarse = lax.dynamic_slice_in_dim(up.x, start // step, size // step, axis=1)

    def product(x, kernel):
        return upsample(x, kernel, up.precision, None)

    x_grad, kernel_grad = jax.vjp(product, coarse, up.kernel)[1](grad)
    bias_grad = None if up.bias is None else grad.astype(wide).sum((0, 1, 2, 3))
    return x_grad, kernel_grad.astype(wide), bias_grad


def _taps(slab):
    """Each column with its neighbors' channels: [N, B, H, W, I] -> [N, B, H, W, 3 I]."""
    width = slab.shape[3]
    slab = jnp.pad(slab, ((0, 0), (0, 0), (0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([slab[..., tap : tap + width, :] for tap in range(3)], axis=-1)


def _conv(taps, kernel, precision):
    """[N, size + 2, H, W, 3 I], [3, 3, 3, I, O] -> [N, size, H, W, O]."""
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
    """[N, size + 2, H, W, 3 I], [N, size, H, W, O] -> [3, 3, 3, I, O]."""
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
    """The columns of all volumes in one axis: [N, B, H, W, C] -> [B, H, N W, C]."""
    slab = jnp.moveaxis(slab, 0, 2)
    return slab.reshape(*slab.shape[:2], -1, slab.shape[-1])
