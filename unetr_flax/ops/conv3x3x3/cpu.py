"""The 3x3x3 convolution on CPU.

XLA's own is several times slower there than PyTorch's, its kernel's gradient more so; but 2D
convolutions and products are as fast as the processor.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unetr_flax.ops.conv2d import conv2d
from unetr_flax.ops.conv3x3x3 import cpu_subpixel, cpu_winograd
from unetr_flax.ops.conv3x3x3.cpu_kernel_grad import kernel_grad
from unetr_flax.ops.conv3x3x3.operands import Operands, backward_as_one, mirrored
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.features import DeferredUpsample
from unetr_flax.ops.materialize import materialize
from unetr_flax.ops.reductions import channel_sums

# Up to this many weights a tap, multiplying numbers one by one beats preparing matrices.
FEW_WEIGHTS = 32


def forward(operands: Operands, *, precision: lax.PrecisionLike, differentiated: bool) -> jax.Array:
    """[N, D, H, W, O]."""
    if not _pays(operands):
        operands = operands.as_one()
    x, up, kernel, bias = operands
    own, further = _split(kernel, up)
    shares = []
    if up is None and kernel[0, 0, 0].size <= FEW_WEIGHTS:
        return _by_voxels(x, kernel, bias, differentiated)
    # Kept, it is a part of training, which gains nothing by it but needs longer to compile.
    if x is not None and not differentiated and cpu_winograd.pays(x, own):
        shares.append((cpu_winograd.results, cpu_winograd.products(x, own, precision)))
    elif x is not None:
        shares.append(_by_slices(x, own, precision))
    if up is not None:
        composed = cpu_subpixel.compose(up.kernel, up.bias, further)
        z = cpu_subpixel.forward(up.x, up.bias is not None, composed, precision)
        shares.append((cpu_subpixel.to_fine, z))
    return _total(shares, kernel, bias, differentiated)


def backward(operands: Operands, grad: jax.Array, *, precision: lax.PrecisionLike) -> Operands:
    """The gradients of the operands."""
    if operands.up is not None and not _pays(operands):
        return backward_as_one(functools.partial(backward, precision=precision), operands, grad)
    x, up, kernel, bias = operands
    own, further = _split(kernel, up)
    x_grad, up_grad, kernel_grads = None, None, []
    if x is not None:
        x_grad = _total([_by_slices(grad, mirrored(own), precision)], kernel, None, True)
        kernel_grads.append(_kernel_grad(x, grad, precision))
    if up is not None:
        up_grad, further_grad = _up_grad(up, further, grad, precision)
        kernel_grads.append(further_grad)
    return Operands(
        x_grad,
        up_grad,
        jnp.concatenate(kernel_grads, axis=-2),
        None if bias is None else channel_sums(grad).astype(bias.dtype),
    )


def _pays(operands: Operands) -> bool:
    up = operands.up
    return up is not None and cpu_subpixel.pays(up.x, up.kernel, _split(operands.kernel, up)[1])


def _split(kernel: jax.Array, up: DeferredUpsample | None) -> tuple[jax.Array, jax.Array | None]:
    """The kernel of the array's channels and that of the up-sampled ones."""
    if up is None:
        return kernel, None
    own = kernel.shape[-2] - up.shape[-1]
    return kernel[..., :own, :], kernel[..., own:, :]


def _total(shares, kernel, bias, differentiated):
    """The sum of what each share's function makes of its numbers, plus the bias."""
    functions, numbers = zip(*shares, strict=True)
    dtype = kernel.dtype
    if bias is None and functions == (_nothing_left,):
        return numbers[0].astype(dtype)

    def add_up(*numbers):
        total = sum(f(z) for f, z in zip(functions, numbers, strict=False))
        if bias is not None:
            total += numbers[-1].astype(total.dtype)
        return total.astype(dtype)

    numbers = (*numbers, *(() if bias is None else (bias,)))
    # A backward pass reads the result again; without one XLA makes the sum a part of what follows.
    return materialize(add_up, kernel, *numbers) if differentiated else add_up(*numbers)


def _by_voxels(x, kernel, bias, differentiated):
    """Every weight times its neighbor, all in one pass."""

    def add_up(kernel, x, *bias):
        _, depth, h, w, inputs = x.shape
        wide = at_least_float32(x.dtype)
        x = _padded(x).astype(wide)
        total = sum(b.astype(wide) for b in bias)
        for i, j, k, c in np.ndindex(3, 3, 3, inputs):
            neighbors = x[:, i : i + depth, j : j + h, k : k + w, c : c + 1]
            total += neighbors * kernel[i, j, k, c].astype(wide)
        return total.astype(kernel.dtype)

    operands = (kernel, x, *(() if bias is None else (bias,)))
    return materialize(add_up, kernel, *operands) if differentiated else add_up(*operands)


def _by_slices(x, kernel, precision):
    """One 2D convolution of all slices, with the three depth taps on the side of fewer channels.

    What is left to do with its result, as a function, and the result.
    """
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    wide = at_least_float32(x.dtype)
    if inputs < features:  # each slice sees its neighbors' channels
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        taps = materialize(_depth_taps, kernel, x).reshape(n * depth, h, w, 3 * inputs)
        y = conv2d(taps, kernel, "SAME", precision, wide)
        return _nothing_left, y.reshape(n, depth, h, w, features)
    # Each slice gives its share in its neighbors' results.
    kernel = jnp.moveaxis(kernel, 0, -2).reshape(3, 3, inputs, 3 * features)
    y = conv2d(x.reshape(n * depth, h, w, inputs), kernel, "SAME", precision, wide)
    return _add_taps, y.reshape(n, depth, h, w, 3, features)


def _depth_taps(x):
    """Each slice with the channels of its two neighbors: [N, D, H, W, I] -> [N, D, H, W, 3 I].

    A sum of padded arrays, as XLA:CPU concatenates few channels number by number.
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


def _nothing_left(y):
    return y


def _add_taps(y):
    """Shares in the results of the slice above, itself and below -> results."""
    zero = jnp.zeros_like(y[:, :1, ..., 0, :])
    below = jnp.concatenate([zero, y[:, :-1, ..., 0, :]], axis=1)
    above = jnp.concatenate([y[:, 1:, ..., 2, :], zero], axis=1)
    return below + y[..., 1, :] + above


def _up_grad(up, kernel, grad, precision):
    """The gradients of an up-sampled input and of its kernel."""
    composed, vjp = jax.vjp(cpu_subpixel.compose, up.kernel, up.bias, kernel)
    z_grad = cpu_subpixel.to_coarse(grad, kernel)

    def windows(x):
        return cpu_subpixel.windows(x, up.bias is not None)

    composed_grad = kernel_grad(up.x, z_grad, windows, precision).reshape(composed.shape)
    up_kernel_grad, up_bias_grad, further_grad = vjp(composed_grad)
    inner = composed[:, :, :, : up.x.shape[-1]]
    x_grad = cpu_subpixel.x_grad(z_grad, inner, precision)
    return DeferredUpsample(x_grad, up_kernel_grad, up_bias_grad, up.precision), further_grad


def _kernel_grad(x, grad, precision):
    if x.shape[-1] > grad.shape[-1]:  # their parts are symmetric, but mirrored
        mirrored = _kernel_grad(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    return kernel_grad(x, grad, _padded, precision)


def _padded(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
