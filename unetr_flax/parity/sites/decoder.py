"""The decoder's sites, in forward order, from the features that it is given to the head."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import NUM_STAGES
from unetr_flax.parity.causes.activation import FUNCTIONS
from unetr_flax.parity.forced import slope_after
from unetr_flax.parity.places import LAST_PART, weights_of
from unetr_flax.parity.sites.site import Site, Values

NORM_EPSILON = 1e-5


def decoder_sites(v: Values) -> Iterator[Site]:
    """Yields the sites of each stage, of the skips that it takes, and of the head."""
    cfg = v.cfg
    before: np.ndarray | None = None
    for i, spec in enumerate(cfg.decoder_stages):
        stage = f"decoder/stage_{i}"
        if not v.wants(stage):
            last = f"{stage}/fuse_{len(spec.fuse_channels) - 1}"
            before = v.theirs.outputs.get(last)
            continue
        try:
            up = f"{stage}/upsample"
            if i == 0:
                yield from _feature(v, up, cfg.skip_layers[-1])
            elif before is not None:
                yield from v.given(up, "input", "direct", {"x": before})
            yield from v.made(up, "deconvolution")
            if i < NUM_STAGES - 1:
                skip = yield from _tower(v, stage, spec, cfg.skip_layers[NUM_STAGES - 2 - i])
            else:
                skip = yield from _image_skip(v, stage, len(spec.skip_channels))
            for j in range(len(spec.fuse_channels)):
                if j == 0:
                    source = ("concatenation", {"skip": skip, "up": v.out(up)})
                else:
                    source = ("direct", {"x": v.out(f"{stage}/fuse_{j - 1}")})
                yield from _block_sites(v, f"{stage}/fuse_{j}", source)
            before = v.out(f"{stage}/fuse_{len(spec.fuse_channels) - 1}")
        except KeyError:
            # A module of this stage is not in the PyTorch model.
            before = None
    if not v.wants(LAST_PART):
        return
    if before is not None:
        yield from v.given("decoder/head", "input", "direct", {"x": before})
    yield from v.made("decoder/head", "convolution")


def _tower(v: Values, stage: str, spec: Any, layer: int) -> Iterator[Site]:
    """Yields the sites of a skip's tower of deconvolutions, and returns what leaves it."""
    value = None
    for j, has_block in enumerate(spec.skip_blocks):
        path = f"{stage}/skip_{j}"
        deconv = v.own(path)
        if value is None:
            yield from _feature(v, deconv, layer)
        else:
            yield from v.given(deconv, "input", "direct", {"x": value})
        yield from v.made(deconv, "deconvolution")
        value = v.out(deconv)
        if has_block:
            yield from _block_sites(v, path, ("direct", {"x": value}))
            value = v.out(path)
    return value


def _image_skip(v: Values, stage: str, blocks: int) -> Iterator[Site]:
    """Yields the sites of the skip that is computed from the image, and returns what leaves it."""
    value = None
    for j in range(blocks):
        path = f"{stage}/skip_{j}"
        source = ("image", {"x": v.image}) if value is None else ("direct", {"x": value})
        yield from _block_sites(v, path, source)
        value = v.out(path)
    return value


def _feature(v: Values, path: str, layer: int) -> Iterator[Site]:
    """Yields the site of a feature of the encoder on its way to a deconvolution."""
    cfg = v.cfg
    arrays = {"grid": np.zeros(cfg.grid_size)}
    for n in range(1, cfg.num_layers + 1):
        following = v.theirs.inputs.get(f"encoder/block_{n}/norm1")
        after = v.theirs.stream if n == cfg.num_layers else following
        if after is not None:
            arrays[f"after {n}"] = after
        normed = v.theirs.outputs.get(f"encoder/block_{n - 1}/norm2")
        if normed is not None:
            arrays[f"normed after {n}"] = normed
    norm = "none"
    if cfg.family_spec.final_norm:
        arrays |= weights_of(v.leaves["encoder/norm"], v.state, cfg)
        if "encoder/norm" in v.theirs.outputs:
            arrays["normed"] = v.out("encoder/norm")
        norm = "final" if layer == cfg.skip_layers[-1] else "none"
    yield from v.given(path, "skip feature", "features", arrays, layer=layer, norm=norm)


def _block_sites(v: Values, path: str, source: tuple[str, dict[str, Any]]) -> Iterator[Site]:
    """Yields the sites of a convolution block, whose input comes from `source`."""
    kind, arrays = source
    what = {"direct": "input"}.get(kind, kind)
    right: dict[str, Any] = {}
    if kind == "concatenation":
        fuse = "fuse" in v.blocks[path].kind if path in v.blocks else False
        right["order"] = "up first" if fuse else "skip first"
    value = v.into(path)
    if v.cfg.block == "conv":
        yield from v.given(f"{path}/conv", what, kind, arrays, **right)
        yield from v.made(f"{path}/conv", "convolution")
        yield from v.given(f"{path}/norm", "input", "direct", {"x": v.out(f"{path}/conv")})
        yield from _norm(v, f"{path}/norm")
        yield from _end(v, path, "activation", {"x": v.out(f"{path}/norm")}, "relu")
        return
    slope = _activation_after(f"{path}/norm1", v.cfg)
    yield from v.given(f"{path}/conv1", what, kind, arrays, block=path, **right)
    yield from v.made(f"{path}/conv1", "convolution")
    yield from v.given(f"{path}/norm1", "input", "direct", {"x": v.out(f"{path}/conv1")})
    yield from _norm(v, f"{path}/norm1")
    normed = {"x": v.out(f"{path}/norm1")}
    yield from v.given(f"{path}/conv2", "activation", "activation", normed, activation=slope)
    yield from v.made(f"{path}/conv2", "convolution")
    yield from v.given(f"{path}/norm2", "input", "direct", {"x": v.out(f"{path}/conv2")})
    yield from _norm(v, f"{path}/norm2")
    if v.cfg.block == "basic":
        yield from _end(v, path, "activation", {"x": v.out(f"{path}/norm2")}, slope)
        return
    shortcut = value
    if f"{path}/conv3" in v.leaves:
        yield from v.given(f"{path}/conv3", "input", "direct", {"x": value})
        yield from v.made(f"{path}/conv3", "convolution")
        if f"{path}/norm3" in v.theirs.outputs:
            yield from v.given(f"{path}/norm3", "input", "direct", {"x": v.out(f"{path}/conv3")})
            yield from _norm(v, f"{path}/norm3")
        # A model that leaves the shortcut out has not run it.
        shortcut = v.theirs.outputs.get(f"{path}/norm3", v.ours.outputs[f"{path}/norm3"])
    arrays = {"y": v.out(f"{path}/norm2"), "x": shortcut, "block input": value}
    yield from _end(v, path, "residual_end", arrays, slope)


def _end(v: Values, path: str, kind: str, arrays: Any, activation: str) -> Iterator[Site]:
    """Yields the site of what a block does after its last module."""
    values = v.ours.outputs[path], v.theirs.outputs[path]
    yield Site(v.name(path), "end of the block", kind, arrays, {"activation": activation}, *values)


def _norm(v: Values, path: str) -> Iterator[Site]:
    cfg = v.cfg
    slope = slope_after(path, cfg)
    activation = _activation_after(path, cfg)
    theirs = v.out(path)
    if slope != 1:
        # Flax's norm applies the activation, too.
        theirs = np.where(theirs > 0, theirs, np.asarray(slope, theirs.dtype) * theirs)
    own = cfg.norm != "batch" or v.train
    for site in v.made(
        path,
        "channel_norm",
        norm=cfg.norm,
        groups=cfg.norm_groups,
        epsilon=NORM_EPSILON,
        activation=activation,
        statistics="own" if own else "running",
    ):
        yield dataclasses.replace(site, theirs=theirs)


def _activation_after(path: str, cfg: UNETRConfig) -> str:
    slope = slope_after(path, cfg)
    name = {1.0: "none", 0.0: "relu"}.get(slope, f"leaky relu {slope:g}")
    assert name in FUNCTIONS
    return name
