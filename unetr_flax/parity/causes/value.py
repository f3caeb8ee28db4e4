"""Relations of two arrays of which nothing is known but that they should be equal."""

import itertools

import torch

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition


def value(
    arrays: Arrays,
    *,
    axes: tuple[int, ...] | None = None,
    reversed_along: int | None = None,
    halves_along: int | None = None,
    added: str = "nothing",
) -> torch.Tensor:
    """Returns x, changed.

    Args:
      arrays: x, the other side's value.
      axes: order of its axes.
      reversed_along: axis that runs backwards.
      halves_along: axis whose two halves change places.
      added: "nothing", "one", or "its negative" (which leaves zero).
    """
    x = arrays["x"]
    if axes is not None:
        if len(axes) != x.ndim:
            raise ValueError("other rank")
        x = x.permute(axes)
    for axis in (reversed_along, halves_along):
        if axis is not None and axis >= x.ndim:
            raise ValueError("other rank")
    if reversed_along is not None:
        x = x.flip(reversed_along)
    if halves_along is not None:
        x = x.roll(x.shape[halves_along] // 2, halves_along)
    return x + {"nothing": 0, "one": 1}[added] if added != "its negative" else 0 * x


CHANGES = (
    *(
        Cause("axes", order, f"axes in the order {order}")
        for rank in (2, 3, 4, 5)
        for order in list(itertools.permutations(range(rank)))[1:]
    ),
    *(Cause("reversed_along", axis, f"axis {axis} reversed") for axis in range(5)),
    *(Cause("halves_along", axis, f"halves of axis {axis} exchanged") for axis in range(5)),
    Cause("added", "one", "one added"),
)
VALUE = Definition(value, (*CHANGES, Cause("added", "its negative", "zero throughout")))
GRADIENT = Definition(
    value,
    (
        Cause("added", "its negative", "no gradient at all (the parameter is frozen or detached)"),
        *CHANGES,
    ),
)
