"""Convolutions, deconvolutions, and the linear map of patches."""

import itertools

import torch
import torch.nn.functional as F

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition
from unetr_flax.parity.causes.linear import BIASES, PRECISION, rounded, with_bias

AXES = (2, 3, 4)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DECONV = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

KERNELS = (
    Cause("flip", True, "kernel flipped"),
    *(
        Cause("axes", axes, f"kernel's spatial axes in the order {tuple(a - 2 for a in axes)}")
        for rank in (3, 2)
        for axes in list(itertools.permutations(AXES[:rank]))[1:]
    ),
    Cause("channels", "exchanged", "kernel's input and output channels exchanged"),
)


def kernel_of(weight: torch.Tensor, flip: bool, axes, channels: str) -> torch.Tensor:
    """Changes the order of a kernel [O, I, *spatial].

    Raises:
      ValueError: if it has another number of axes.
    """
    if axes is not None:
        if len(axes) != weight.ndim - 2:
            raise ValueError("other rank")
        weight = weight.permute(0, 1, *axes)
    if flip:
        weight = weight.flip(tuple(range(2, weight.ndim)))
    return weight.transpose(0, 1) if channels == "exchanged" else weight


def convolution(
    arrays: Arrays,
    *,
    flip: bool = False,
    axes: tuple[int, ...] | None = None,
    channels: str = "right",
    halves: str = "right",
    padding: str = "zeros",
    dilation: int = 1,
    bias: str = "added",
    precision: str = "full",
) -> torch.Tensor:
    """Convolves x [B, I, *spatial] with the weight [O, I, *kernel], keeping its size.

    Args:
      arrays: x, weight and bias.
      flip: whether the kernel is mirrored.
      axes: order of the kernel's spatial axes.
      channels: "right" or "exchanged".
      halves: "exchanged" if the two halves of the input channels change places.
      padding: "zeros", "reflect", "replicate", "circular" or "after" (all at the far end).
      dilation: distance of the kernel's taps.
      bias: "added", "dropped" or "twice".
      precision: precision of the products.
    """
    weight = kernel_of(arrays["weight"], flip, axes, channels)
    x = arrays["x"]
    if halves == "exchanged":
        x = x.roll(x.shape[1] // 2, 1)
    widths = [(k - 1) * dilation for k in reversed(weight.shape[2:])]
    if padding == "after":
        sides = [side for width in widths for side in (0, width)]
    else:
        sides = [side for width in widths for side in (width // 2, width - width // 2)]
    mode = "constant" if padding in ("zeros", "after") else padding
    if any(sides):
        x = F.pad(x, sides, mode=mode)
    y = CONV[x.ndim - 2](rounded(x, precision), rounded(weight, precision), dilation=dilation)
    return with_bias(y, arrays, bias, axis=1)


def deconvolution(
    arrays: Arrays,
    *,
    flip: bool = False,
    axes: tuple[int, ...] | None = None,
    channels: str = "right",
    bias: str = "added",
    upsample: str = "deconvolution",
    mixing: str = "mean",
    precision: str = "full",
) -> torch.Tensor:
    """Up-samples x [B, I, *spatial] by the weight [I, O, *strides].

    Args:
      arrays: x, weight and bias.
      flip: whether the kernel is mirrored.
      axes: order of the kernel's spatial axes.
      channels: "right" or "exchanged".
      bias: "added", "dropped" or "twice".
      upsample: "deconvolution", or the mode of an interpolation in its place.
      mixing: how an interpolation's channels are mixed: by the "mean" or the "sum" of the kernel's
        taps, or "none".
      precision: precision of the products.
    """
    x = arrays["x"]
    weight = kernel_of(arrays["weight"], flip, axes, channels)
    strides = arrays["weight"].shape[2:]
    if upsample == "deconvolution":
        y = DECONV[x.ndim - 2](rounded(x, precision), rounded(weight, precision), stride=strides)
        return with_bias(y, arrays, bias, axis=1)
    mode, _, corners = upsample.partition(", ")
    options = {} if mode == "nearest" else {"align_corners": corners == "corners aligned"}
    if mode == "linear":
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.ndim - 2]
    y = F.interpolate(x, scale_factor=tuple(map(float, strides)), mode=mode, **options)
    taps = tuple(range(2, weight.ndim))
    if mixing != "none":
        mixed = weight.mean(taps) if mixing == "mean" else weight.sum(taps)
        y = torch.einsum("bi...,io->bo...", y, mixed)
    return with_bias(y, arrays, bias, axis=1)


def patches(
    arrays: Arrays,
    *,
    flip: bool = False,
    axes: tuple[int, ...] | None = None,
    flatten: str = "voxels, channels",
    bias: str = "added",
    precision: str = "full",
) -> torch.Tensor:
    """Maps each patch of x [B, C, *spatial] by the weight [E, C, *patch] -> [B, E, *grid].

    Args:
      arrays: x, weight and bias.
      flip: whether the kernel is mirrored.
      axes: order of the kernel's spatial axes.
      flatten: order in which a linear map's patches were flattened; "channels, voxels" where the
        channels stand first.
      bias: "added", "dropped" or "twice".
      precision: precision of the products.
    """
    x, weight = arrays["x"], arrays["weight"]
    size = weight.shape[2:]
    if flatten == "channels, voxels":
        weight = weight.movedim(1, -1).reshape(weight.shape)
    weight = kernel_of(weight, flip, axes, "right")
    if weight.shape[2:] != size:
        # The features of a patch are read in another order of the axes.
        weight = weight.reshape(arrays["weight"].shape)
    y = CONV[x.ndim - 2](rounded(x, precision), rounded(weight, precision), stride=size)
    return with_bias(y, arrays, bias, axis=1)


CONVOLUTION = Definition(
    convolution,
    (
        *KERNELS,
        Cause("halves", "exchanged", "halves of the concatenation exchanged"),
        *(
            Cause("padding", mode, f"padded by {words}")
            for mode, words in (
                ("reflect", "reflection"),
                ("replicate", "repeated borders"),
                ("circular", "wrapping around"),
                ("after", "zeros at the far end only"),
            )
        ),
        Cause("dilation", 2, "dilation 2"),
        *BIASES,
        *PRECISION,
    ),
)
DECONVOLUTION = Definition(
    deconvolution,
    (
        *KERNELS,
        *BIASES,
        *(
            Cause("upsample", mode, f"up-sampled by {words} instead of a deconvolution")
            for mode, words in (
                ("nearest", "nearest neighbors"),
                ("linear", "linear interpolation"),
                ("linear, corners aligned", "linear interpolation with aligned corners"),
            )
        ),
        Cause("mixing", "sum", "taps of the kernel summed"),
        Cause("mixing", "none", "channels not mixed"),
        *PRECISION,
    ),
)
PATCHES = Definition(
    patches,
    (
        *KERNELS[:-1],
        Cause("flatten", "channels, voxels", "patches flattened with the channels first"),
        *BIASES,
        *PRECISION,
    ),
)
