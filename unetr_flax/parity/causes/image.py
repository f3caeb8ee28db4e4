"""The image as it reaches the first convolutions: its layout and its normalization."""

import itertools

import torch

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

ORDERS = tuple(order for rank in (2, 3) for order in list(itertools.permutations(range(rank)))[1:])


def image(
    arrays: Arrays,
    *,
    axes: tuple[int, ...] | None = None,
    flipped: tuple[int, ...] = (),
    layout: str = "right",
    channels: str = "right",
    normalization: str = "none",
) -> torch.Tensor:
    """Returns the image [B, C, *spatial].

    Args:
      arrays: x, the image that both models were given.
      axes: order of the spatial axes.
      flipped: spatial axes that run backwards.
      layout: "read as channels last" where channels-last numbers were read as channels first, or
        the other way round, without moving them.
      channels: "right" or "reversed".
      normalization: "none", "deviation one" (mean 0 and deviation 1, per channel or over all), "to
        one" (0 to 1), "divided by 255", "clipped to one".
    """
    x = arrays["x"]
    rank = x.ndim - 2
    if axes is not None:
        if len(axes) != rank:
            raise ValueError("other rank")
        x = x.permute(0, 1, *(axis + 2 for axis in axes))
    if flipped:
        if max(flipped) >= rank:
            raise ValueError("other rank")
        x = x.flip(tuple(axis + 2 for axis in flipped))
    if layout == "read as channels first":
        x = x.movedim(1, -1).reshape(x.shape)
    elif layout == "read as channels last":
        shape = (len(x), *x.shape[2:], x.shape[1])
        x = x.reshape(shape).movedim(-1, 1)
    if channels == "reversed":
        x = x.flip(1)
    spatial = tuple(range(2, x.ndim))
    match normalization:
        case "deviation one, per channel":
            x = (x - x.mean(spatial, keepdim=True)) / x.std(spatial, keepdim=True, correction=0)
        case "deviation one":
            axes_all = tuple(range(1, x.ndim))
            x = (x - x.mean(axes_all, keepdim=True)) / x.std(axes_all, keepdim=True, correction=0)
        case "to one":
            low, high = x.amin(spatial, keepdim=True), x.amax(spatial, keepdim=True)
            x = (x - low) / (high - low)
        case "divided by 255":
            x = x / 255
        case "clipped to one":
            x = x.clamp(0, 1)
        case "mean subtracted":
            x = x - x.mean(spatial, keepdim=True)
        case "mapped from 0..1 to -1..1":
            x = 2 * x - 1
    return x


IMAGE = Definition(
    image,
    (
        Cause("normalization", "deviation one, per channel", "image normalized to deviation one"),
        Cause("normalization", "deviation one", "image normalized over all channels"),
        Cause("normalization", "to one", "image scaled to the range 0 to 1"),
        Cause("normalization", "divided by 255", "image divided by 255"),
        Cause("normalization", "clipped to one", "image clipped to the range 0 to 1"),
        Cause("normalization", "mean subtracted", "the image's mean subtracted"),
        Cause("normalization", "mapped from 0..1 to -1..1", "image mapped from 0..1 to -1..1"),
        Cause("channels", "reversed", "the image's channels in reverse order"),
        Cause("layout", "read as channels first", "channels-last numbers read as channels first"),
        Cause("layout", "read as channels last", "channels-first numbers read as channels last"),
        *(
            Cause("axes", order, f"the image's spatial axes in the order {order}")
            for order in ORDERS
        ),
        *(
            Cause("flipped", axes, f"the image mirrored along its axes {axes}")
            for count in (1, 2, 3)
            for axes in itertools.combinations(range(3), count)
        ),
    ),
)
