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

# The CPU's weight gradient is a scan over depth, whose operands stay in the caches; but slices of
# up to this many voxels go into one product, as sums over so few cost less than adding them up.
ONE_PRODUCT_SLICE = 100


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
    product, and 3x3x3 kernels of stride 1 to 2D convolutions on CPU. The latter have reverse-mode
    derivatives only.
    """
    strides = tuple(window_strides)
    kernel = rhs.shape[:-2]
    plain = (
        dimension_numbers == _channels_last(lhs.ndim)
        and rhs.ndim == lhs.ndim
        and rhs.shape[-2] == lhs.shape[-1]
        and rhs.dtype == lhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
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


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`jax.lax.dot_general`, whose gradient reads each cotangent once.

    Arguments, result and errors are the original's. A product of [*batch, *I] and [*I, *O], a
    linear map, has a gradient of its own.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    count = len(lhs_sum)
    linear = (
        not lhs_batch
        and not rhs_batch
        and tuple(lhs_sum) == tuple(range(lhs.ndim - count, lhs.ndim))
        and tuple(rhs_sum) == tuple(range(count))
        and lhs.dtype == rhs.dtype
        and lhs.shape[-count:] == rhs.shape[:count]
        and preferred_element_type is None
    )
    if not linear:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)
    inputs = math.prod(rhs.shape[:count])
    y = _linear(lhs.reshape(-1, inputs), rhs.reshape(inputs, -1), precision)
    return y.reshape(*lhs.shape[:-count], *rhs.shape[count:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """[N, I], [I, O] -> [N, O]."""
    return jnp.matmul(x, kernel, precision=precision)


def _linear_fwd(x, kernel, precision):
    return _linear(x, kernel, precision), (x, kernel)


def _linear_bwd(precision, residuals, grad):
    x, kernel = residuals
    # JAX would multiply with the transposed gradient. XLA:CPU computes that copy by itself, with
    # all that leads to the gradient: for a residual stream, the sum over all later blocks.
    x_grad = jnp.matmul(grad, kernel.T, precision=precision)
    return x_grad, jnp.matmul(x.T, grad, precision=precision)


_linear.defvjp(_linear_fwd, _linear_bwd)


class ConvTranspose(nn.ConvTranspose):
    """`nn.ConvTranspose` whose kernel is its stride: one matrix product, then one transposition.

    Fields, parameters and result are those of `nn.ConvTranspose`.

    Raises:
      ValueError: if the kernel is not the stride, or padding not "VALID", or masks, dilation or a
        transposed kernel are asked for.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[*batch, *spatial, C] -> [*batch, *(spatial * strides), features]."""
        kernel_size = self.kernel_size
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        strides = 1 if self.strides is None else self.strides
        strides = (strides,) * len(kernel_size) if isinstance(strides, int) else tuple(strides)
        if strides != kernel_size or self.padding != "VALID":
            raise ValueError(
                f"strides={self.strides}, padding={self.padding!r}: must be kernel_size="
                f"{kernel_size} and 'VALID'"
            )
        dilation = self.kernel_dilation
        if self.mask is not None or dilation not in (None, 1) or self.transpose_kernel:
            raise ValueError("mask, kernel_dilation, transpose_kernel: must be left out")
        shape = (*kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        batch = inputs.shape[: -len(shape) + 1]
        inputs = inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :])
        # A transposed convolution of nn.ConvTranspose slides its kernel, so it lands mirrored.
        kernel = jnp.flip(kernel, range(len(kernel_size)))
        y = _upsample(inputs, kernel, self.precision, self.preferred_element_type)
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + bias


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Layouts [N, *spatial, C] and [*spatial, I, O]."""
    spatial = tuple(range(ndim - 2))
    data = (0, ndim - 1, *(axis + 1 for axis in spatial))
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *spatial), data)


def _patch_product(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution whose windows do not overlap: [N, *S, I], [*P, I, O] -> [N, *(S / P), O]."""
    *patch, _, features = kernel.shape
    x = _space_to_depth(x, patch)
    y = _linear(x.reshape(-1, x.shape[-1]), kernel.reshape(-1, features), precision)
    return y.reshape(*x.shape[:-1], features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _upsample(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, result: DTypeLike | None
) -> jax.Array:
    """out[2i + a] = x[i] kernel[a] on each axis: [N, *S, I], [*P, I, O] -> [N, *(S * P), O]."""
    *patch, inputs, features = kernel.shape
    columns = jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1)  # [I, *P O]
    y = jnp.matmul(x, columns, precision=precision, preferred_element_type=result)
    return _depth_to_space(y, patch, features)


def _upsample_fwd(x, kernel, precision, result):
    return _upsample(x, kernel, precision, result), (x, kernel)


def _upsample_bwd(precision, result, residuals, grad):
    x, kernel = residuals
    *patch, inputs, features = kernel.shape
    # Without the barrier the permutation would be computed in each of the two products.
    grad = lax.optimization_barrier(_space_to_depth(grad.astype(x.dtype), patch))  # [N, *S, *P O]
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
        cpu=functools.partial(_conv3x3x3_by_slices, precision=precision),
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


def _sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """What sums of products are kept in, until they are rounded once: float32 or wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def _conv3x3x3_native(x, kernel, precision):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=_channels_last(5), precision=precision
    )


def _kernel_grad_native(x, grad, precision):
    shape = jax.ShapeDtypeStruct((3, 3, 3, x.shape[-1], grad.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda k: _conv3x3x3_native(x, k, precision), shape)
    return transpose(grad)[0]


def _conv3x3x3_by_slices(x, kernel, precision):
    """One 2D convolution of all slices, with the three depth taps on the side of fewer channels."""
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    wide = _sum_dtype(x.dtype)
    if inputs < features:  # each slice sees its neighbours' channels
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([x[:, tap : tap + depth] for tap in range(3)], axis=-1)
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        y = _conv3x3(x.reshape(n * depth, h, w, 3 * inputs), kernel, precision, wide)
        return y.reshape(n, depth, h, w, features).astype(x.dtype)
    # Each slice gives its share in its neighbours' results.
    taps = jnp.moveaxis(kernel, 0, -2).reshape(3, 3, inputs, 3 * features)
    y = _conv3x3(x.reshape(n * depth, h, w, inputs), taps, precision, wide)
    y = y.reshape(n, depth, h, w, 3, features)
    zero = jnp.zeros((n, 1, h, w, features), wide)
    below = jnp.concatenate([zero, y[:, :-1, ..., 0, :]], axis=1)
    above = jnp.concatenate([y[:, 1:, ..., 2, :], zero], axis=1)
    return (below + y[..., 1, :] + above).astype(x.dtype)


def _conv3x3(x, kernel, precision, result):
    """2D, stride 1, SAME padding: [N, H, W, I], [3, 3, I, O] -> [N, H, W, O]."""
    types = {"precision": precision, "preferred_element_type": result}
    if x.dtype == jnp.float64:
        # XLA:CPU has no fast float64 convolution, but a fast float64 product.
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        columns = jnp.concatenate(windows, axis=-1)  # [N, H, W, 9 I]
        return jnp.matmul(columns, kernel.reshape(-1, kernel.shape[-1]), **types)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_channels_last(4), **types
    )


def _kernel_grad_by_products(x, grad, precision):
    """Sums [9 I, voxels] @ [voxels, 3 O] over slices: 9 in-plane shifts of x, 3 depths of grad.

    Channels come first and rows are padded, so that every shift is an offset in a flat slice. The
    batch stays an axis to the end: devices that share it exchange nothing but the sum.
    """
    n, depth, h, w, inputs = x.shape
    features = grad.shape[-1]
    if inputs > features:  # shift the smaller of both: their parts are symmetric, but mirrored
        mirrored = _kernel_grad_by_products(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    row = w + 2
    x_slices = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))).transpose(0, 1, 4, 2, 3)
    x_slices = x_slices.reshape(n, depth, inputs, (h + 2) * row)
    x_slices = jnp.pad(x_slices, ((0, 0), (0, 0), (0, 0), (0, 2)))
    grad = jnp.pad(grad, ((0, 0), (1, 1), (0, 0), (0, 2), (0, 0))).transpose(0, 1, 4, 2, 3)
    grad = grad.reshape(n, depth + 2, features, h * row)

    def columns(slices):
        offsets = [i * row + j for i in range(3) for j in range(3)]
        return jnp.concatenate([slices[..., o : o + h * row] for o in offsets], axis=-2)

    wide = _sum_dtype(x.dtype)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    if h * w <= ONE_PRODUCT_SLICE:
        depths = jnp.concatenate([grad[:, tap : tap + depth] for tap in range(3)], axis=2)
        total = product("ndiv,ndov->io", columns(x_slices), depths)
    else:

        def add_slice(total, i):
            x_slice = lax.dynamic_index_in_dim(x_slices, i, axis=1, keepdims=False)
            depths = lax.dynamic_slice_in_dim(grad, i, 3, axis=1).reshape(n, 3 * features, -1)
            return total + product("niv,nov->nio", columns(x_slice), depths), None

        zero = jnp.zeros((n, 9 * inputs, 3 * features), wide)
        total = lax.scan(add_slice, zero, jnp.arange(depth))[0].sum(0)
    total = total.reshape(3, 3, inputs, 3, features).astype(x.dtype)
    # Slice i of x meets slice i - 1 of the gradient first, to which it is the last depth tap.
    return jnp.flip(jnp.moveaxis(total, 3, 0), 0)
