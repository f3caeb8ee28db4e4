"""Position embeddings, and the order in which patches become tokens."""

import itertools
import math

import torch
import torch.nn.functional as F

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

# Orders of a grid's axes other than the right one, for two and three axes.
GRID_ORDERS = tuple(
    order for rank in (2, 3) for order in list(itertools.permutations(range(rank)))[1:]
)


def flatten_grid(x: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    """Flattens patches [B, E, *grid] to tokens [B, N, E], the axes in an order.

    Raises:
      ValueError: if the grid has another number of axes.
    """
    if order is not None:
        if len(order) != x.ndim - 2:
            raise ValueError("other rank")
        x = x.permute(0, 1, *(axis + 2 for axis in order))
    return x.flatten(2).transpose(1, 2)


def positions(
    arrays: Arrays,
    *,
    added: str = "once",
    sequence: tuple[int, ...] | None = None,
    tokens: tuple[int, ...] | None = None,
    grid: tuple[int, ...] | None = None,
    read_as: tuple[int, ...] | None = None,
    resize: str | None = None,
    post_norm: bool = False,
) -> torch.Tensor:
    """Adds position embeddings to the patches x [B, E, *grid] -> tokens [B, N, E].

    Args:
      arrays: x; positions [1, N, E], of another number of tokens if they are resized, whose grid is
        then the shape of the array "stored grid"; "stored positions" of that grid, if a model may
        resize those instead; and "post-norm", the first block's input in a model that norms after
        each sum.
      added: "once", "twice", "not", "first only" (the first token's for all) or "reversed".
      sequence: order of the grid's axes in which tokens stand, with their positions.
      tokens: order of the grid's axes in which patches become tokens.
      grid: order in which the positions' grid axes are transposed.
      read_as: order of the axes in which the positions' tokens were laid out, wrongly.
      resize: "linear" on the grid, "nearest", "linear, corners aligned" or "along the sequence";
        if None, the positions are taken as they are, or resized linearly if they must be.
      post_norm: whether the value is that of a post-norm block.
    """
    if post_norm:
        return arrays["post-norm"]
    x = arrays["x"]
    sizes = tuple(x.shape[2:])
    position = arrays["positions"]
    if resize is not None:
        position = arrays.get("stored positions", position)
    if position.shape[1] != math.prod(sizes):
        grid_size = tuple(arrays["stored grid"].shape)
        position = _resized(position, grid_size, sizes, resize or "linear")
    for order, inverse in ((grid, False), (read_as, True)):
        if order is None:
            continue
        if len(order) != len(sizes):
            raise ValueError("other rank")
        if inverse:
            laid_out = position.reshape(1, *(sizes[axis] for axis in order), -1)
            back = [order.index(axis) + 1 for axis in range(len(sizes))]
            position = laid_out.permute(0, *back, -1)
        else:
            position = position.reshape(1, *sizes, -1).permute(0, *(a + 1 for a in order), -1)
        position = position.reshape(1, -1, x.shape[1])
    if added == "reversed":
        position = position.flip(1)
    elif added == "first only":
        position = position[:, :1]
    factor = {"twice": 2.0, "not": 0.0}.get(added, 1.0)
    y = flatten_grid(x, tokens) + factor * position
    if sequence is None:
        return y
    return flatten_grid(y.reshape(len(y), *sizes, -1).movedim(-1, 1), sequence)


def _resized(
    position: torch.Tensor, stored: tuple[int, ...], sizes: tuple[int, ...], resize: str
) -> torch.Tensor:
    width = position.shape[-1]
    if resize == "along the sequence":
        sequence = F.interpolate(position.transpose(1, 2), size=math.prod(sizes), mode="linear")
        return sequence.transpose(1, 2)
    mode, _, corners = resize.partition(", ")
    grid = position.reshape(1, *stored, width).movedim(-1, 1)
    if mode == "linear":
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sizes)]
    options = {} if mode == "nearest" else {"align_corners": corners == "corners aligned"}
    return F.interpolate(grid, size=sizes, mode=mode, **options).flatten(2).transpose(1, 2)


POSITIONS = Definition(
    positions,
    (
        Cause("added", "not", "position embedding missing"),
        Cause("added", "twice", "position embedding added twice"),
        Cause("added", "reversed", "position embedding in reverse order"),
        Cause("added", "first only", "the first token's position embedding added to all tokens"),
        *(
            Cause(
                "sequence", order, f"tokens and positions in the order of the grid's axes {order}"
            )
            for order in GRID_ORDERS
        ),
        *(
            Cause("tokens", order, f"patches flattened with the grid's axes in the order {order}")
            for order in GRID_ORDERS
        ),
        *(
            Cause("grid", order, f"position embedding transposed to the grid's axes {order}")
            for order in GRID_ORDERS
        ),
        *(
            Cause("read_as", order, f"position embedding laid out as a grid of the axes {order}")
            for order in GRID_ORDERS
        ),
        *(
            Cause("resize", mode, f"position embedding interpolated {words}")
            for mode, words in (
                ("linear", "linearly on the grid"),
                ("nearest", "by nearest neighbors"),
                ("linear, corners aligned", "with aligned corners"),
                ("along the sequence", "along the sequence of tokens"),
            )
        ),
        Cause("post_norm", True, "post-norm: each norm follows the sum instead of preceding it"),
    ),
)
