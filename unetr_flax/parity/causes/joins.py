"""What stands between modules: residual streams, norms' places, skips and concatenations."""

import torch

from unetr_flax.parity.causes.embedding import GRID_ORDERS
from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

POST_NORM = "post-norm: each norm follows the sum instead of preceding it"
NORM_ADDED = "a norm without parameters (epsilon {:g}) added"
FINAL_EPSILONS = (1e-5, 1e-6)


def direct(arrays: Arrays, *, source: str = "x") -> torch.Tensor:
    """Passes an array on unchanged: x, or another one by its name."""
    return arrays[source]


def stream(arrays: Arrays, *, form: str = "all") -> torch.Tensor:
    """Computes the residual stream after a transformer block, [B, N, E].

    Args:
      arrays: x, the stream before the block; attention and mlp, its sublayers' outputs; middle, the
        sum after attention; and "own middle", the same in the model that is judged; "post-norm".
      form: "all" adds both sublayers to the stream; "middle" and "own middle" the second one to the
        sum of the first. The rest are mistakes, among them a norm at the end, by its epsilon.
    """
    match form:
        case "all":
            return arrays["x"] + arrays["attention"] + arrays["mlp"]
        case "middle" | "own middle":
            return arrays[form] + arrays["mlp"]
        case "mlp":
            return arrays["mlp"]
        case "normed":
            return arrays["middle normed"] + arrays["mlp"]
        case "parallel":
            return arrays["x"] + arrays["mlp"]
        case "1e-05" | "1e-06":
            return _normed(arrays["x"] + arrays["attention"] + arrays["mlp"], float(form))
        case _:
            return arrays[form]


def middle(arrays: Arrays, *, form: str = "sum") -> torch.Tensor:
    """Computes the residual stream between attention and feed-forward layer, [B, N, E]."""
    match form:
        case "sum":
            return arrays["x"] + arrays["attention"]
        case "attention":
            return arrays["attention"]
        case "normed":
            return arrays["normed"] + arrays["attention"]
        case "difference":
            return arrays["x"] - arrays["attention"]
        case "post-norm":
            return arrays["normed"] + arrays["mlp"]
        case _:
            return arrays[form]


def features(
    arrays: Arrays,
    *,
    layer: int,
    norm: str,
    grid: tuple[int, ...] | None = None,
    post_norm: bool = False,
) -> torch.Tensor:
    """Takes a feature of the encoder as a grid [B, E, *grid].

    Args:
      arrays: "after n", the stream after block n, counted from 1; "normed after n", the second
        norm's result in that block; normed, the last stream normed;
        scale and bias of the final norm, where there is one; and "grid", of the grid's shape.
      layer: block whose output is taken.
      norm: "none", "final" (with parameters), or a norm without parameters by its epsilon.
      grid: order of the axes in which the tokens are laid out.
      post_norm: whether the value is that of a post-norm block.
    """
    x = arrays[f"normed after {layer}" if post_norm else f"after {layer}"]
    if norm == "final":
        x = arrays["normed"] if "normed" in arrays else _normed(x, 1e-5)
    elif norm == "final on all":
        x = _normed(x, 1e-5) * arrays["scale"] + arrays["bias"]
    elif norm != "none":
        x = _normed(x, float(norm))
    sizes = tuple(arrays["grid"].shape)
    if grid is None:
        return x.reshape(len(x), *sizes, -1).movedim(-1, 1)
    if len(grid) != len(sizes):
        raise ValueError("other rank")
    x = x.reshape(len(x), *(sizes[axis] for axis in grid), -1)
    return x.permute(0, -1, *(grid.index(axis) + 1 for axis in range(len(sizes))))


def _normed(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=epsilon)


def concatenation(arrays: Arrays, *, order: str) -> torch.Tensor:
    """Concatenates skip and up-sampled features [B, C, *spatial] along the channels."""
    skip, up = arrays["skip"], arrays["up"]
    match order:
        case "skip first":
            return torch.cat([skip, up], 1)
        case "up first":
            return torch.cat([up, skip], 1)
        case "skip twice":
            return torch.cat([skip, skip], 1)
        case "up twice":
            return torch.cat([up, up], 1)
        case "skip zero":
            return torch.cat([0 * skip, up], 1)
        case "zero skip":
            return torch.cat([up, 0 * skip], 1)
        case "alternating":
            return torch.stack([skip, up], 2).flatten(1, 2)
    raise ValueError(order)


DIRECT = Definition(
    direct,
    (
        Cause("source", "unnormed", "the norm before it left out"),
        Cause("source", "post-norm", POST_NORM),
    ),
)
STREAM = Definition(
    stream,
    (
        Cause("form", "middle", ""),
        Cause("form", "own middle", ""),
        Cause("form", "mlp", "the residual sum around the feed-forward layer left out"),
        Cause("form", "parallel", "attention's output missing in the sum"),
        Cause("form", "normed", "the normed tokens added instead of the stream"),
        Cause("form", "post-norm", POST_NORM),
        *(Cause("form", str(epsilon), NORM_ADDED.format(epsilon)) for epsilon in FINAL_EPSILONS),
    ),
)
MIDDLE = Definition(
    middle,
    (
        Cause("form", "attention", "the residual sum around attention left out"),
        Cause("form", "normed", "the normed tokens added instead of the stream"),
        Cause("form", "difference", "attention's output subtracted"),
        Cause("form", "x", "attention's output not added"),
        Cause("form", "post-norm", POST_NORM),
    ),
)
FEATURES = Definition(
    features,
    (
        Cause("norm", "none", "the final norm missing", instead=""),
        Cause("norm", "final", "the final norm"),
        *(Cause("norm", str(epsilon), NORM_ADDED.format(epsilon)) for epsilon in FINAL_EPSILONS),
        Cause("norm", "final on all", "the final norm applied to this skip, too"),
        Cause("post_norm", True, POST_NORM),
        *(Cause("layer", n, f"the feature after block {n}") for n in range(1, 33)),
        *(
            Cause("grid", order, f"tokens laid out as a grid of the axes {order}")
            for order in GRID_ORDERS
        ),
    ),
)
CONCATENATION = Definition(
    concatenation,
    (
        Cause("order", "up first", "up-sampled features before the skip in the concatenation"),
        Cause("order", "skip first", "the skip before the up-sampled features"),
        Cause("order", "skip twice", "the skip concatenated with itself"),
        Cause("order", "up twice", "the up-sampled features concatenated with themselves"),
        Cause("order", "skip zero", "the skip is zero"),
        Cause("order", "zero skip", "the skip is zero"),
        Cause("order", "alternating", "channels of skip and up-sampled features alternate"),
    ),
)
