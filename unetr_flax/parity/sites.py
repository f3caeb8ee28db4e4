"""Sites: every module, and everything between two modules, with its values in both models.

A site has what its definition needs: the inputs on which both models computed it, the weights, and
the settings that the configuration asks for.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import NUM_STAGES
from unetr_flax.parity.causes.activation import FUNCTIONS
from unetr_flax.parity.forced import slope_after
from unetr_flax.parity.places import (
    ALL_PARTS,
    EMBEDDING,
    LAST_PART,
    find_places,
    qkv_order,
    weights_of,
)
from unetr_flax.parity.record import Recording

NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Site:
    """One module, or what stands between two.

    Attributes:
      name: PyTorch name of the module, or of the module that the value goes to.
      what: "" for a module's own output, else what stands before or in it, such as "attention".
      kind: name of its definition in `causes.DEFINITIONS`.
      arrays: inputs and weights in PyTorch's layouts, by the names in the definition.
      right: settings of the definition that the configuration asks for.
      ours: the Flax model's value.
      theirs: the PyTorch model's value.
      own: the Flax model's inputs, where they differ from those in `arrays`.
    """

    name: str
    what: str
    kind: str
    arrays: Mapping[str, np.ndarray]
    right: Mapping[str, Any]
    ours: np.ndarray
    theirs: np.ndarray
    own: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Values:
    """Both recordings, and the weights by PyTorch's names."""

    cfg: UNETRConfig
    image: np.ndarray
    ours: Recording
    theirs: Recording
    state: Mapping[str, np.ndarray]
    mask: np.ndarray | None
    train: bool
    parts: frozenset[str]

    def wants(self, part: str) -> bool:
        return part in self.parts

    def __post_init__(self):
        self.leaves, self.blocks = find_places(self.cfg)

    def into(self, path: str) -> np.ndarray:
        return self.theirs.inputs[path]

    def out(self, path: str) -> np.ndarray:
        """Returns PyTorch's result; of a norm, before the activation."""
        return self.theirs.outputs[path]

    def name(self, path: str) -> str:
        return {**self.blocks, **self.leaves}[path].name

    def own(self, path: str) -> str:
        """Returns the path of the map in a deconvolution, which may have a folder of its own."""
        inner = f"{path}/deconv"
        return inner if inner in self.leaves else path

    def given(
        self, path: str, what: str, kind: str, arrays: Any, *, block: str = "", **right: Any
    ) -> Iterator[Site]:
        """Yields the site of what stands before a module, or before the block that it begins."""
        key = f"{block} block" if f"{block} block" in self.ours.inputs else path
        if key in self.ours.inputs and path in self.theirs.inputs:
            values = self.ours.inputs[key], self.theirs.inputs[path]
            yield Site(self.name(path), what, kind, arrays, right, *values)
        if key != path:
            yield from self.given(path, "input", "direct", {"x": self.into(path)})

    def made(self, path: str, kind: str, arrays: Any = None, **right: Any) -> Iterator[Site]:
        """Yields the site of a module that is compared alone."""
        if path in self.ours.outputs and path in self.theirs.outputs:
            arrays = dict(arrays or {}, **weights_of(self.leaves[path], self.state, self.cfg))
            arrays.setdefault("x", self.into(path))
            values = self.ours.outputs[path], self.theirs.outputs[path]
            yield Site(self.name(path), "", kind, arrays, right, *values)


def find_sites(
    cfg: UNETRConfig,
    image: np.ndarray,
    ours: Recording,
    theirs: Recording,
    state: Mapping[str, np.ndarray],
    *,
    mask: np.ndarray | None = None,
    train: bool = False,
    parts: frozenset[str] = ALL_PARTS,
) -> Iterator[Site]:
    """Yields the sites in forward order; those that a model does not have are left out.

    Args:
      cfg: the configuration.
      image: [B, C, *img_size], as both models got it.
      ours: the Flax model on PyTorch's inputs, by `run_forced`.
      theirs: the PyTorch model.
      state: weights by PyTorch's names.
      mask: boolean attention mask, if both got one.
      train: whether both ran in training mode.
      parts: the parts whose sites are wanted, of `places.parts_of`.
    """
    values = _Values(cfg, image, ours, theirs, state, mask, train, parts)
    if values.wants("encoder"):
        yield from _embedding(values)
        yield from _blocks(values)
    yield from _decoder(values)
    head = "decoder/head"
    if head in theirs.outputs and values.wants(LAST_PART):
        arrays, right = {"x": values.out(head)}, {"activation": "none"}
        yield Site("logits", "", "logits", arrays, right, ours.logits, theirs.logits)


def _embedding(v: _Values) -> Iterator[Site]:
    yield from v.given(EMBEDDING, "image", "image", {"x": v.image})
    yield from v.made(EMBEDDING, "patches")
    first = "encoder/block_0"
    if EMBEDDING in v.theirs.outputs and f"{first}/attention/qkv" in v.theirs.inputs:
        arrays = _positions(v, post_norm=True)
        yield from v.given(f"{first}/norm1", "position embedding", "positions", arrays, block=first)


def _positions(v: _Values, *, post_norm: bool) -> dict[str, np.ndarray]:
    key = next(key for key in v.state if key.endswith("position_embeddings"))
    arrays = {"x": v.out(EMBEDDING), "positions": v.state[key]}
    block = "encoder/block_0"
    if post_norm and f"{block}/attention/projection" in v.theirs.outputs:
        attention = v.out(f"{block}/attention/projection")
        arrays["post-norm"] = v.into(f"{block}/attention/qkv") + attention
    return arrays


def _blocks(v: _Values) -> Iterator[Site]:
    for i in range(v.cfg.num_layers):
        try:
            yield from _block(v, i)
        except KeyError:
            # A module of this block is not in the PyTorch model.
            continue
    norm = "encoder/norm"
    if v.cfg.family_spec.final_norm:
        yield from v.made(norm, "layer_norm", epsilon=v.cfg.family_spec.layer_norm_epsilon)


def _block(v: _Values, i: int) -> Iterator[Site]:
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


def _stream_after(v: _Values, i: int) -> Iterator[Site]:
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


def _decoder(v: _Values) -> Iterator[Site]:
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


def _tower(v: _Values, stage: str, spec: Any, layer: int) -> Iterator[Site]:
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


def _image_skip(v: _Values, stage: str, blocks: int) -> Iterator[Site]:
    """Yields the sites of the skip that is computed from the image, and returns what leaves it."""
    value = None
    for j in range(blocks):
        path = f"{stage}/skip_{j}"
        source = ("image", {"x": v.image}) if value is None else ("direct", {"x": value})
        yield from _block_sites(v, path, source)
        value = v.out(path)
    return value


def _feature(v: _Values, path: str, layer: int) -> Iterator[Site]:
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


def _block_sites(v: _Values, path: str, source: tuple[str, dict[str, Any]]) -> Iterator[Site]:
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


def _end(v: _Values, path: str, kind: str, arrays: Any, activation: str) -> Iterator[Site]:
    """Yields the site of what a block does after its last module."""
    values = v.ours.outputs[path], v.theirs.outputs[path]
    yield Site(v.name(path), "end of the block", kind, arrays, {"activation": activation}, *values)


def _norm(v: _Values, path: str) -> Iterator[Site]:
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
