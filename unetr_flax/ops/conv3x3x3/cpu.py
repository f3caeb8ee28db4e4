"""The 3x3x3 convolution on CPU.

XLA's own 3D convolution is several times slower there than PyTorch's, and its kernel's gradient
slower still, but its 2D convolutions and matrix products run at the processor's speed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.conv3x3x3 import cpu_subpixel, cpu_winograd
from unetr_flax.ops.conv3x3x3.cpu_kernel_grad import kernel_grad
from unetr_flax.ops.conv3x3x3.operands import ArrayOperands, Operands, backward_as_one, mirrored
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredUpsample
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.reductions import channel_sums

# Up to this many weights per tap, elementwise products beat preparing matrices.
FEW_WEIGHTS = 32


def forward(
    operands: ArrayOperands, *, precision: lax.PrecisionLike, differentiated: bool
) -> jax.Array:
    """Computes [N, D, H, W, O]."""
    if not _pays(operands):
        operands = operands.as_one()
    x, up, kernel, bias = operands
    own = _own_kernel(kernel, up)
    shares = []
    if up is None and kernel[0, 0, 0].size <= FEW_WEIGHTS:
        return _by_voxels(x, kernel, bias, differentiated)
    # Training gains nothing by minimal filtering, and would take longer to compile.
    if x is not None and not differentiated and cpu_winograd.pays(x, own):
        shares.append((cpu_winograd.results, cpu_winograd.products(x, own, precision)))
    elif x is not None:
        shares.append(_by_slices(x, own, precision))
    if up is not None:
        composed = cpu_subpixel.compose(up.kernel, up.bias, _up_kernel(kernel, up))
        z = cpu_subpixel.forward(up.x, up.bias is not None, composed, precision)
        shares.append((cpu_subpixel.to_fine, z))
    return _total(shares, kernel, bias, differentiated)


def backward(
    operands: ArrayOperands, grad: jax.Array, *, precision: lax.PrecisionLike
) -> ArrayOperands:
    """Computes the gradients of the operands."""
    if operands.up is not None and not _pays(operands):
        return backward_as_one(functools.partial(backward, precision=precision), operands, grad)
    x, up, kernel, bias = operands
    x_grad, up_grad, kernel_grads = None, None, []
    if x is not None:
        own = mirrored(_own_kernel(kernel, up))
        x_grad = _total([_by_slices(grad, own, precision)], kernel, None, True)
        kernel_grads.append(_kernel_grad(x, grad, precision))
    if up is not None:
        up_grad, up_kernel_grad = _up_grad(up, _up_kernel(kernel, up), grad, precision)
        kernel_grads.append(up_kernel_grad)
    return Operands(
        x_grad,
        up_grad,
        jnp.concatenate(kernel_grads, axis=-2),
        None if bias is None else channel_sums(grad).astype(bias.dtype),
    )


def _pays(operands: ArrayOperands) -> bool:
    """Tells whether to convolve an up-sampled volume on its coarse grid."""
    up = operands.up
    return up is not None and cpu_subpixel.pays(up.x, up.kernel, _up_kernel(operands.kernel, up))


def _own_kernel(kernel: jax.Array, up: DeferredUpsample[jax.Array] | None) -> jax.Array:
    """Returns the kernel's part for the channels that are not up-sampled."""
    return kernel if up is None else kernel[..., : kernel.shape[-2] - up.shape[-1], :]


def _up_kernel(kernel: jax.Array, up: DeferredUpsample[jax.Array]) -> jax.Array:
    """Returns the kernel's part for the up-sampled channels."""
    return kernel[..., kernel.shape[-2] - up.shape[-1] :, :]


def _total(shares, kernel, bias, differentiated):
    """Computes the sum of each share's function of its numbers, plus the bias."""
    functions, numbers = zip(*shares, strict=True)
    dtype = kernel.dtype
    if bias is None and functions == (_identity,):
        return numbers[0].astype(dtype)

    def add_up(*numbers):
        total: Any = sum(f(z) for f, z in zip(functions, numbers, strict=False))
        if bias is not None:
            total += numbers[-1].astype(total.dtype)
        return total.astype(dtype)

    numbers = (*numbers, *(() if bias is None else (bias,)))
    # A backward pass reads the sum again; without one XLA fuses the sum into the next operation.
    return materialize(add_up, kernel, *numbers) if differentiated else add_up(*numbers)


def _by_voxels(x, kernel, bias, differentiated):
    """Adds every weight times its neighbor, all in one pass."""

    def add_up(kernel, x, *bias):
        _, depth, h, w, inputs = x.shape
        wide = at_least_float32(x.dtype)
        x = _padded(x).astype(wide)
        total: Any = sum(b.astype(wide) for b in bias)
        for i, j, k, c in np.ndindex(3, 3, 3, inputs):
            neighbors = x[:, i : i + depth, j : j + h, k : k + w, c : c + 1]
            total += neighbors * kernel[i, j, k, c].astype(wide)
        return total.astype(kernel.dtype)

    operands = (kernel, x, *(() if bias is None else (bias,)))
    return materialize(add_up, kernel, *operands) if differentiated else add_up(*operands)


def _by_slices(x, kernel, precision):
    """Convolves all slices in 2D, with the three depth taps on the side of fewer channels.

    Returns a function from the convolution's result to the 3D one, and that result.
    """
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    wide = at_least_float32(x.dtype)
    if inputs < features:
        # Each slice sees its neighbors' channels.
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        taps = materialize(_depth_taps, kernel, x).reshape(n * depth, h, w, 3 * inputs)
        y = conv2d(taps, kernel, "SAME", precision, wide)
        return _identity, y.reshape(n, depth, h, w, features)
    # Each slice computes its share in its neighbors' results.
    kernel = jnp.moveaxis(kernel, 0, -2).reshape(3, 3, inputs, 3 * features)
    y = conv2d(x.reshape(n * depth, h, w, inputs), kernel, "SAME", precision, wide)
    return _add_taps, y.reshape(n, depth, h, w, 3, features)


def _depth_taps(x):
    """Gives slices their two neighbors' channels: [N, D, H, W, I] -> [N, D, H, W, 3 I].

    XLA:CPU concatenates few channels number by number, so this is a sum of padded arrays.
    """
    inputs, zero = x.shape[-1], jnp.zeros((), x.dtype)
    nothing = (0, 0, 0)

    def share(tap):
        return lax.pad(
            x,
            zero,
            (
                nothing,
                (1 - tap, tap - 1, 0),
                nothing,
                nothing,
                (tap * inputs, (2 - tap) * inputs, 0),
            ),
        )

    return share(0) + share(1) + share(2)


def _identity(y):
    return y


def _add_taps(y):
    """Adds each slice's shares in the results of the slices above, itself and below."""
    zero = jnp.zeros_like(y[:, :1, ..., 0, :])
    below = jnp.concatenate([zero, y[:, :-1, ..., 0, :]], axis=1)
    above = jnp.concatenate([y[:, 1:, ..., 2, :], zero], axis=1)
    return below + y[..., 1, :] + above


def _up_grad(up, kernel, grad, precision):
    """Computes the gradients of an up-sampled input and of the kernel's part for it."""
    composed, vjp = jax.vjp(cpu_subpixel.compose, up.kernel, up.bias, kernel)
    z_grad = cpu_subpixel.to_coarse(grad, kernel)

    def windows(x):
        return cpu_subpixel.windows(x, up.bias is not None)

    composed_grad = kernel_grad(up.x, z_grad, windows, precision).reshape(composed.shape)
    deconv_kernel_grad, deconv_bias_grad, kernel_part_grad = vjp(composed_grad)
    inner = composed[:, :, :, : up.x.shape[-1]]
    x_grad = cpu_subpixel.x_grad(z_grad, inner, precision)
    up_grad = DeferredUpsample(x_grad, deconv_kernel_grad, deconv_bias_grad, up.precision)
    return up_grad, kernel_part_grad


def _kernel_grad(x, grad, precision):
    if x.shape[-1] > grad.shape[-1]:
        # With input and gradient exchanged the kernel's gradient comes out mirrored.
        mirrored = _kernel_grad(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    return kernel_grad(x, grad, _padded, precision)


def _padded(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
