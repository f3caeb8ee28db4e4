"""How a convolution or an up-sampling is lowered on CPU, GPU and TPU; nothing else knows.

Parameters and results are those of `nn.Conv` and `nn.ConvTranspose`; only the operations that
compute them differ. On CPU, XLA's own 3D convolution is several times slower than PyTorch's, its
weight gradient and its transposed convolution more so; GPU and TPU have good convolutions.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# Up to this many voxels the CPU's weight gradient is one matrix product; beyond it a scan over
# slices, whose operands stay in the caches.
ONE_PRODUCT_VOXELS = 2 * 16**3


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, lowered well where UNETR uses it.

    Arguments, result and errors are the original's. Channels last, undilated and ungrouped, two
    kinds are lowered otherwise: kernels that are their own stride (patches, and 1x1x1) to a matrix
    product, and 3x3x3 kernels of stride 1 to 2D convolutions on CPU.
    """
    strides = tuple(window_strides)
    kernel = rhs.shape[:-2]
    plain = (
        dimension_numbers == _channels_last(lhs.ndim)
        and all(set(d) == {1} for d in (lhs_dilation, rhs_dilation) if d is not None)
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and padding in ("SAME", "VALID")
    )
    if plain and kernel == strides and not any(map(int.__mod__, lhs.shape[1:-1], kernel)):
        return _patch_product(lhs, rhs, precision)
    if plain and kernel == (3, 3, 3) and strides == (1, 1, 1) and padding == "SAME":
        return _conv3x3x3(lhs, rhs, precision)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


class ConvTranspose(nn.ConvTranspose):
    """`nn.ConvTranspose` whose kernel is its stride: one matrix product, then one transposition.

    Fields, parameters and result are those of `nn.ConvTranspose`.

    Raises:
      ValueError: if the kernel is not the stride, or padding not "VALID", or masks, dilation or a
        transposed kernel are asked for.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, *spatial, C] -> [B, *(spatial * strides), features]."""
        kernel_size = tuple(self.kernel_size)
        if tuple(self.strides or ()) != kernel_size or self.padding != "VALID":
            raise ValueError(
                f"strides={self.strides}, padding={self.padding!r}: must be kernel_size="
                f"{kernel_size} and 'VALID'"
            )
        if self.mask is not None or self.kernel_dilation is not None or self.transpose_kernel:
            raise ValueError("mask, kernel_dilation, transpose_kernel: must be left out")
        shape = (*kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        # A transposed convolution of nn.ConvTranspose slides its kernel, so it lands mirrored.
        y = _upsample(inputs, jnp.flip(kernel, range(len(kernel_size))), self.precision)
        return y if bias is None else y + bias


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Layouts [N, *spatial, C] and [*spatial, I, O]."""
    spatial = tuple(range(ndim - 2))
    data = (0, ndim - 1, *(axis + 1 for axis in spatial))
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *spatial), data)


def _patch_product(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution whose windows do not overlap: [N, *S, I], [*P, I, O] -> [N, *(S / P), O]."""
    *patch, _, features = kernel.shape
    grid = [size // p for size, p in zip(x.shape[1:-1], patch, strict=True)]
    if math.prod(patch) > 1:
        rank = len(patch)
        split = [n for pair in zip(grid, patch, strict=True) for n in pair]
        x = x.reshape(x.shape[0], *split, x.shape[-1])  # [N, G, P, G, P, ..., I]
        outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
        x = x.transpose(0, *outer, *inner, 2 * rank + 1)  # [N, *G, *P, I]
    x = x.reshape(x.shape[0], *grid, -1)
    return jnp.matmul(x, kernel.reshape(-1, features), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _upsample(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """out[2i + a] = x[i] kernel[a] on each axis: [N, *S, I], [*P, I, O] -> [N, *(S * P), O]."""
    *patch, inputs, features = kernel.shape
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    y = jnp.matmul(x, columns, precision=precision)
    return _depth_to_space(y, patch, features)


def _upsample_fwd(x, kernel, precision):
    return _upsample(x, kernel, precision), (x, kernel)


def _upsample_bwd(precision, residuals, grad):
    x, kernel = residuals
    *patch, inputs, features = kernel.shape
    # Without the barrier the permutation would be computed in each of the two products.
    grad = lax.optimization_barrier(_space_to_depth(grad, patch))  # [N, *S, *P O]
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    x_grad = jnp.matmul(grad, columns.T, precision=precision)
    columns_grad = jnp.matmul(
        x.reshape(-1, inputs).T, grad.reshape(-1, grad.shape[-1]), precision=precision
    )
    return x_grad, jnp.moveaxis(columns_grad.reshape(inputs, *patch, features), 0, -2)


_upsample.defvjp(_upsample_fwd, _upsample_bwd)


def _depth_to_space(y: jax.Array, patch: Sequence[int], features: int) -> jax.Array:
    """[N, *S, *P O] -> [N, *(S * P), O]."""
    n, *grid, _ = y.shape
    rank = len(patch)
    y = y.reshape(n, *grid, *patch, features)
    pairs = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    y = y.transpose(0, *pairs, 1 + 2 * rank)
    return y.reshape(n, *(s * p for s, p in zip(grid, patch, strict=True)), features)


def _space_to_depth(y: jax.Array, patch: Sequence[int]) -> jax.Array:
    """The inverse of `_depth_to_space`."""
    n, *size, features = y.shape
    rank = len(patch)
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    y = y.reshape(n, *(k for pair in zip(grid, patch, strict=True) for k in pair), features)
    y = y.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 1 + 2 * rank)
    return y.reshape(n, *grid, -1)


# The gradients are written out so that each picks its platform by itself: differentiating through
# the choice would keep the intermediate results of every platform.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3x3(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Stride 1, SAME padding: [N, D, H, W, I], [3, 3, 3, I, O] -> [N, D, H, W, O]."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_conv3x3x3_by_depth_taps, precision=precision),
        default=functools.partial(_conv3x3x3_native, precision=precision),
    )


def _conv3x3x3_fwd(x, kernel, precision):
    return _conv3x3x3(x, kernel, precision), (x, kernel)


def _conv3x3x3_bwd(precision, residuals, grad):
    x, kernel = residuals
    mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
    kernel_grad = lax.platform_dependent(
        x,
        grad,
        cpu=functools.partial(_kernel_grad_by_products, precision=precision),
        default=functools.partial(_kernel_grad_native, precision=precision),
    )
    return _conv3x3x3(grad, mirrored, precision), kernel_grad


_conv3x3x3.defvjp(_conv3x3x3_fwd, _conv3x3x3_bwd)


def _conv3x3x3_native(x, kernel, precision):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=_channels_last(5), precision=precision
    )


def _kernel_grad_native(x, grad, precision):
    shape = jax.ShapeDtypeStruct((3, 3, 3, x.shape[-1], grad.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda k: _conv3x3x3_native(x, k, precision), shape)
    return transpose(grad)[0]


def _conv3x3x3_by_depth_taps(x, kernel, precision):
    """One 2D convolution of every slice gives three depth taps, which are added with a shift."""
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    taps = jnp.moveaxis(kernel, 0, -2).reshape(3, 3, inputs, 3 * features)
    y = _conv3x3(x.reshape(n * depth, h, w, inputs), taps, precision)
    y = y.reshape(n, depth, h, w, 3, features)
    zero = jnp.zeros((n, 1, h, w, features), y.dtype)
    below = jnp.concatenate([zero, y[:, :-1, ..., 0, :]], axis=1)
    above = jnp.concatenate([y[:, 1:, ..., 2, :], zero], axis=1)
    return below + y[..., 1, :] + above


def _conv3x3(x, kernel, precision):
    """2D, stride 1, SAME padding: [N, H, W, I], [3, 3, I, O] -> [N, H, W, O]."""
    if x.dtype == jnp.float64:
        # XLA:CPU has no fast float64 convolution, but a fast float64 product.
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        columns = jnp.concatenate(windows, axis=-1)  # [N, H, W, 9 I]
        return jnp.matmul(columns, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_channels_last(4), precision=precision
    )


def _kernel_grad_by_products(x, grad, precision):
    """Sums [9 I, voxels] @ [voxels, 3 O] over slices: 9 in-plane shifts of x, 3 depths of grad.

    Channels come first and rows are padded, so that every shift is an offset in a flat slice.
    """
    n, depth, h, w, inputs = x.shape
    features = grad.shape[-1]
    row = w + 2
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))).transpose(0, 1, 4, 2, 3)
    x = x.reshape(n * depth, inputs, (h + 2) * row)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 2)))
    grad = jnp.pad(grad, ((0, 0), (1, 1), (0, 0), (0, 2), (0, 0))).transpose(0, 1, 4, 2, 3)
    grad = grad.reshape(n, depth + 2, features, h * row)
    # Slice d of x meets the gradient of slices d + 1, d and d - 1 through depth taps 0, 1 and 2.
    grad = jnp.concatenate([grad[:, 2:], grad[:, 1:-1], grad[:, :-2]], axis=2)
    grad = grad.reshape(n * depth, 3 * features, h * row)

    def product(x_slice, grad_slice):
        offsets = [i * row + j for i in range(3) for j in range(3)]
        columns = [x_slice[..., o : o + h * row] for o in offsets]
        columns = jnp.concatenate(columns, axis=-2)  # [..., 9 I, voxels]
        voxels = (0, 2) if columns.ndim == 3 else (1,)
        return lax.dot_general(columns, grad_slice, ((voxels, voxels), ((), ())), precision)

    if n * depth * h * w <= ONE_PRODUCT_VOXELS:
        total = product(x, grad)
    else:
        zero = jnp.zeros((9 * inputs, 3 * features), x.dtype)
        total, _ = lax.scan(lambda sum_, both: (sum_ + product(*both), None), zero, (x, grad))
    return jnp.moveaxis(total.reshape(3, 3, inputs, 3, features), 3, 0)
