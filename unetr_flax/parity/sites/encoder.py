"""The encoder's sites, in forward order."""

from collections.abc import Iterator

import numpy as np

from unetr_flax.parity.places import EMBEDDING, qkv_order
from unetr_flax.parity.sites.site import Site, Values


def encoder_sites(v: Values) -> Iterator[Site]:
    """Yields the sites of the embedding, of each block, and of the norm after them."""
    yield from _embedding(v)
    yield from _blocks(v)


def _embedding(v: Values) -> Iterator[Site]:
    yield from v.given(EMBEDDING, "image", "image", {"x": v.image})
    yield from v.made(EMBEDDING, "patches")
    first = "encoder/block_0"
    if EMBEDDING in v.theirs.outputs and f"{first}/attention/qkv" in v.theirs.inputs:
        arrays = {**_positions(v, post_norm=True), **_stored_positions(v)}
        yield from v.given(f"{first}/norm1", "position embedding", "positions", arrays, block=first)


def _positions(v: Values, *, post_norm: bool) -> dict[str, np.ndarray]:
    key = next(key for key in v.state if key.endswith("position_embeddings"))
    arrays = {"x": v.out(EMBEDDING), "positions": v.state[key]}
    block = "encoder/block_0"
    if post_norm and f"{block}/attention/projection" in v.theirs.outputs:
        attention = v.out(f"{block}/attention/projection")
        arrays["post-norm"] = v.into(f"{block}/attention/qkv") + attention
    return arrays


def _stored_positions(v: Values) -> dict[str, np.ndarray]:
    """Returns PyTorch's table of another grid, from which somebody's own model may interpolate.

    The number of its tokens does not tell the grid, so it must be that of equal axes.
    """
    table, rank = v.theirs.positions, v.cfg.spatial_rank
    if table is None or table.ndim != 3 or table.shape[1] == v.cfg.num_patches:
        return {}
    edge = round(table.shape[1] ** (1 / rank))
    if edge**rank != table.shape[1]:
        return {}
    return {"stored positions": table, "stored grid": np.zeros((edge,) * rank)}


def _blocks(v: Values) -> Iterator[Site]:
    for i in range(v.cfg.num_layers):
        try:
            yield from _block(v, i)
        except KeyError:
            # A module of this block is not in the PyTorch model.
            continue
    norm = "encoder/norm"
    if v.cfg.family_spec.final_norm:
        yield from v.made(norm, "layer_norm", epsilon=v.cfg.family_spec.layer_norm_epsilon)


def _block(v: Values, i: int) -> Iterator[Site]:
    block = f"encoder/block_{i}"
    norm1, qkv = f"{block}/norm1", f"{block}/attention/qkv"
    projection, norm2 = f"{block}/attention/projection", f"{block}/norm2"
    expand, contract = f"{block}/feed_forward/expand", f"{block}/feed_forward/contract"
    cfg, spec = v.cfg, v.cfg.family_spec
    order = qkv_order(cfg)
    yield from v.made(norm1, "layer_norm", epsilon=spec.layer_norm_epsilon)
    before = v.out(f"encoder/block_{i - 1}/norm2") if i else None
    arrays = {"x": v.out(norm1), "unnormed": v.into(norm1)}
    if before is not None:
        arrays["post-norm"] = before
    elif EMBEDDING in v.theirs.outputs:
        position = _positions(v, post_norm=False)
        x = position["x"]
        arrays["post-norm"] = x.reshape(*x.shape[:2], -1).swapaxes(1, 2) + position["positions"]
    yield from v.given(qkv, "norm", "direct", arrays)
    yield from v.made(qkv, "qkv", heads=cfg.num_heads, order=order)
    arrays = {"qkv": v.out(qkv)}
    if v.mask is not None:
        arrays["mask"] = v.mask
    if f"{block}/attention" in v.theirs.dropped:
        arrays["dropped"] = v.theirs.dropped[f"{block}/attention"]
    yield from v.given(
        projection,
        "attention",
        "attention",
        arrays,
        scale="head" if spec.scale_by_head else "embedding",
        mask="ignored" if v.mask is None else "applied",
        order=order,
        right_order=order,
    )
    yield from v.made(projection, "projection", heads=cfg.num_heads)
    arrays = {
        "x": v.into(norm1),
        "attention": v.out(projection),
        "normed": v.out(norm1),
        "mlp": v.out(contract),
    }
    yield from v.given(norm2, "residual sum", "middle", arrays)
    yield from v.made(norm2, "layer_norm", epsilon=spec.layer_norm_epsilon)
    arrays = {"x": v.out(norm2), "unnormed": v.into(norm2), "post-norm": v.out(norm1)}
    yield from v.given(expand, "norm", "direct", arrays)
    yield from v.made(expand, "linear")
    yield from v.given(
        contract, "activation", "activation", {"x": v.out(expand)}, activation=spec.activation
    )
    yield from v.made(contract, "linear")
    yield from _stream_after(v, i)


def _stream_after(v: Values, i: int) -> Iterator[Site]:
    block, following = f"encoder/block_{i}", f"encoder/block_{i + 1}"
    last = i == v.cfg.num_layers - 1
    theirs = v.theirs.stream if last else v.theirs.inputs.get(f"{following}/norm1")
    if theirs is None or block not in v.ours.outputs:
        return
    arrays = {
        "x": v.into(f"{block}/norm1"),
        "attention": v.out(f"{block}/attention/projection"),
        "middle": v.into(f"{block}/norm2"),
        "middle normed": v.out(f"{block}/norm2"),
        "own middle": v.ours.inputs[f"{block}/norm2"],
        "mlp": v.out(f"{block}/feed_forward/contract"),
    }
    if last:
        arrays["post-norm"] = v.out(f"{block}/norm2")
        name = v.name(f"{block}/feed_forward/contract")
    else:
        attention = v.out(f"{following}/attention/projection")
        arrays["post-norm"] = v.into(f"{following}/attention/qkv") + attention
        name = v.name(f"{following}/norm1")
    yield Site(name, "residual sum", "stream", arrays, {}, v.ours.outputs[block], theirs)
