"""Linear maps of tokens, among them queries, keys and values, and the projection of the heads."""

import itertools

import einops
import torch

from unetr_flax.parity.causes.explain import Arrays, Cause, Definition

# Orders of the output features of one linear map of queries, keys and values.
QKV_ORDERS = tuple(f"({' '.join(order)})" for order in itertools.permutations(("h", "d", "qkv")))
# Which of the three is taken for queries, keys and values.
ROLES = tuple("".join(order) for order in itertools.permutations("qkv"))

PRECISION = (
    Cause("precision", "bfloat16", "products of bfloat16 numbers (reduced precision)"),
    # Float16 has as many digits, in a smaller range.
    Cause("precision", "tf32", "products of TF32 or float16 numbers (reduced precision)"),
)
BIASES = (
    Cause("bias", "dropped", "bias dropped"),
    Cause("bias", "twice", "bias added twice"),
)


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """Rounds to the operands of products in a precision, "full" for none."""
    if precision == "full":
        return x
    if precision == "tf32":
        # TF32 keeps 10 of float32's 23 bits of mantissa.
        bits = x.float().contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()
    return x.to(getattr(torch, precision)).double()


def with_bias(y: torch.Tensor, arrays: Arrays, bias: str, axis: int = -1) -> torch.Tensor:
    """Adds the bias along an axis, if there is one."""
    if "bias" not in arrays or bias == "dropped":
        return y
    shape = [1] * y.ndim
    shape[axis] = -1
    return y + arrays["bias"].reshape(shape) * (2 if bias == "twice" else 1)


def linear(
    arrays: Arrays, *, transposed: bool = False, bias: str = "added", precision: str = "full"
) -> torch.Tensor:
    """Maps x [..., I] by the weight [O, I]."""
    weight = arrays["weight"].T if transposed else arrays["weight"]
    return with_bias(rounded(arrays["x"], precision) @ rounded(weight, precision).T, arrays, bias)


def qkv(
    arrays: Arrays,
    *,
    heads: int,
    order: str,
    bias_order: str | None = None,
    roles: str = "qkv",
    bias: str = "added",
    precision: str = "full",
) -> torch.Tensor:
    """Maps x [B, N, E] to queries, keys and values [B, N, qkv, h, d].

    Args:
      arrays: x, weight [3 E, E] and bias [3 E].
      heads: number of heads.
      order: order of the output features of the weight.
      bias_order: the same of the bias, where it differs.
      roles: which of the three maps makes queries, keys and values.
      bias: "added", "dropped" or "twice".
      precision: precision of the products.
    """
    y = rounded(arrays["x"], precision) @ rounded(arrays["weight"], precision).T
    y = split_heads(y, order, heads)
    if "bias" in arrays and bias != "dropped":
        y = y + split_heads(arrays["bias"], bias_order or order, heads) * (
            2 if bias == "twice" else 1
        )
    return y[..., ["qkv".index(role) for role in roles], :, :]


def split_heads(x: torch.Tensor, order: str, heads: int) -> torch.Tensor:
    """Splits the last axis in an order such as "(h d qkv)": [..., 3 E] -> [..., qkv, h, d]."""
    return einops.rearrange(x, f"... {order} -> ... qkv h d", h=heads, qkv=3)


def projection(
    arrays: Arrays,
    *,
    heads: int,
    join: str = "(h d)",
    transposed: bool = False,
    bias: str = "added",
    precision: str = "full",
) -> torch.Tensor:
    """Maps the joined heads x [B, N, (h d)] to [B, N, E]."""
    x = einops.rearrange(arrays["x"], f"b n (h d) -> b n {join}", h=heads)
    return linear({**arrays, "x": x}, transposed=transposed, bias=bias, precision=precision)


TRANSPOSED = Cause("transposed", True, "weight transposed")
LINEAR = Definition(linear, (*BIASES, TRANSPOSED, *PRECISION))
QKV = Definition(
    qkv,
    (
        *(Cause("order", order, f"q, k and v split as {order}") for order in QKV_ORDERS),
        *(
            Cause("bias_order", order, f"bias of q, k and v split as {order}")
            for order in QKV_ORDERS
        ),
        *(Cause("roles", roles, f"{', '.join(roles)} taken for q, k, v") for roles in ROLES[1:]),
        *BIASES,
        *PRECISION,
    ),
)
PROJECTION = Definition(
    projection,
    (Cause("join", "(d h)", "heads joined as (d h)"), *BIASES, TRANSPOSED, *PRECISION),
)
