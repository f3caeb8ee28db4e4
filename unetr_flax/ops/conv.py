"""Convolutions.

Parameters and results are those of `nn.Conv`; only the operations that compute them differ. On CPU,
XLA's own 3D convolution is several times slower than PyTorch's, its weight gradient more so; GPU
and TPU have good convolutions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.linear import linear
from unetr_flax.ops.patches import space_to_depth

# The CPU's weight gradient is a scan over depth, whose operands stay in the caches; but slices of
# up to this many voxels go into one product, as sums over so few cost less than adding them up.
ONE_PRODUCT_SLICE = 100

# Up to this many of a TPU's 128 lanes, joining the depth taps to the channels costs the least
# traffic, by its compiler's figures; beyond it native convolutions do.
FILLED_LANES = 48


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


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Layouts [N, *spatial, C] and [*spatial, I, O]."""
    spatial = tuple(range(ndim - 2))
    data = (0, ndim - 1, *(axis + 1 for axis in spatial))
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *spatial), data)


def _patch_product(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution whose windows do not overlap: [N, *S, I], [*P, I, O] -> [N, *(S / P), O]."""
    *patch, _, features = kernel.shape
    x = space_to_depth(x, patch)
    y = linear(x.reshape(-1, x.shape[-1]), kernel.reshape(-1, features), precision)
    return y.reshape(*x.shape[:-1], features)


# The gradients are written out so that each picks its platform by itself: differentiating through
# the choice would keep the intermediate results of every platform.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3x3(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Stride 1, SAME padding: [N, D, H, W, I], [3, 3, 3, I, O] -> [N, D, H, W, O]."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_conv3x3x3_by_slices, precision=precision),
        tpu=functools.partial(_conv3x3x3_by_lanes, precision=precision),
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
        tpu=functools.partial(_kernel_grad_by_lanes, precision=precision),
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


def _conv3x3x3_by_lanes(x, kernel, precision):
    """For TPU, which pads few channels to many: the depth taps join them, or are added up."""
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    if 3 * inputs <= FILLED_LANES:
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        y = _conv3x3(_depth_taps(x).reshape(n * depth, h, w, -1), kernel, precision, None)
        return y.reshape(n, depth, h, w, features)
    if inputs > FILLED_LANES:
        return _conv3x3x3_native(x, kernel, precision)
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    slices = (padded[:, tap : tap + depth].reshape(n * depth, h, w, inputs) for tap in range(3))
    wide = _sum_dtype(x.dtype)
    y = sum(_conv3x3(z, kernel[tap], precision, wide) for tap, z in enumerate(slices))
    return y.reshape(n, depth, h, w, features).astype(x.dtype)


def _kernel_grad_by_lanes(x, grad, precision):
    """The same for the kernel's gradient: the taps join the channels of the narrower side."""
    n, depth, h, w, inputs = x.shape
    features = grad.shape[-1]
    if 3 * min(inputs, features) > FILLED_LANES:
        return _kernel_grad_native(x, grad, precision)
    if inputs > features:
        mirrored = _kernel_grad_by_lanes(grad, x, precision)
        return jnp.flip(mirrored, (0, 1, 2)).swapaxes(-1, -2)
    taps = _depth_taps(x).reshape(n * depth, h, w, 3 * inputs)
    shape = jax.ShapeDtypeStruct((3, 3, 3 * inputs, features), x.dtype)
    transpose = jax.linear_transpose(lambda k: _conv3x3(taps, k, precision, None), shape)
    kernel = transpose(grad.reshape(n * depth, h, w, features))[0]
    return jnp.moveaxis(kernel.reshape(3, 3, 3, inputs, features), 2, 0)


def _depth_taps(x):
    """Each slice with the channels of its two neighbours: [N, D, H, W, I] -> [N, D, H, W, 3 I]."""
    depth = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, tap : tap + depth] for tap in range(3)], axis=-1)


def _conv3x3x3_by_slices(x, kernel, precision):
    """One 2D convolution of all slices, with the three depth taps on the side of fewer channels."""
    n, depth, h, w, inputs = x.shape
    features = kernel.shape[-1]
    wide = _sum_dtype(x.dtype)
    if inputs < features:  # each slice sees its neighbours' channels
        kernel = jnp.moveaxis(kernel, 0, -3).reshape(3, 3, 3 * inputs, features)
        y = _conv3x3(_depth_taps(x).reshape(n * depth, h, w, -1), kernel, precision, wide)
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
