"""Comparison of one forward pass: outputs of modules, skip features, attention, stages, logits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from unetr_flax import ops
from unetr_flax.model.abstract import abstract_image, abstract_variables
from unetr_flax.model.blocks import LEAKY_RELU_SLOPE
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.decoder_spec import NUM_STAGES
from unetr_flax.model.unetr import UNETR
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.run_once import jit_to_run_once, run_once
from unetr_flax.parity.slabs import ConvolutionsInSlabs
from unetr_flax.parity.torch_models import TorchModelError
from unetr_flax.parity.twins import (
    Twins,
    channels_first,
    channels_first_tensor,
    named_modules,
    precise,
)
from unetr_flax.runtime.aot import compile_in_background
from unetr_flax.weights.families import family_of
from unetr_flax.weights.mapping import ModulePair, module_pairs

# Kinds of modules whose outputs are tokens [B, N, ...]; others give grids, channels last in Flax.
TOKEN_KINDS = ("embedding", "attention", "norm", "feed_forward", "linear", "qkv", "projection")

# Kinds of modules with one part, whose output is their own.
WRAPPERS = ("single_conv", "single_fuse_conv", "single_deconv", "head")

# Kinds of three linear maps that a family has in place of one for queries, keys and values.
QKV_KINDS = ("query", "key", "value")

# Name of the logits that the model computes if it need not return its attention weights.
PREDICTED = "logits, as predicted"

# Arrays in PyTorch's layouts, by rung and then by PyTorch's name.
Found = dict[str, dict[str, np.ndarray]]


# (variables, image) -> what `forward` returns.
Evaluate = Callable[[Any, np.ndarray], Any]


def compile_evaluation(cfg: UNETRConfig, dtype: str, batch: int) -> Evaluate:
    """Begins to compile `forward` in the background, with the settings of `precise()`.

    Args:
      cfg: the configuration.
      dtype: "float32" or "float64", of variables and image.
      batch: volumes in the image.
    """

    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype)

    model = UNETR(cfg, param_dtype=jnp.dtype(dtype))
    with precise():
        shapes = jax.tree.map(cast, (abstract_variables(UNETR(cfg)), abstract_image(cfg, batch)))
    evaluate = jit_to_run_once(functools.partial(forward, cfg, model))
    return compile_in_background(evaluate, *shapes, settings=precise)


def activation_rows(
    twins: Twins, mask: np.ndarray | None = None, evaluate: Evaluate | None = None
) -> list[Row]:
    """Compares every module in order of depth, then skips, attention, stages and logits.

    What somebody's own PyTorch model does not have is left out. Where predictions compute attention
    in another form, without its weights, their logits are compared, too.

    Args:
      twins: both models and their image.
      mask: boolean attention mask [B, H, N, N], if the PyTorch model takes one (only the
        reference does).
      evaluate: the Flax side without a mask, if it is compiled already.
    """
    if evaluate is None:
        function = functools.partial(forward, twins.cfg, twins.model, mask=mask)
        evaluate = functools.partial(run_once, function)
    ours = flax_found(twins.cfg, evaluate(twins.variables, twins.image))
    return compared_rows(twins, ours, mask)


def compared_rows(twins: Twins, ours: Found, mask: np.ndarray | None = None) -> list[Row]:
    """Runs the PyTorch model and compares each output as soon as it is computed.

    Neither PyTorch's outputs nor those that have been compared are kept, to bound the memory.

    Args:
      twins: both models.
      ours: the Flax model's outputs, taken away one by one.
      mask: boolean attention mask [B, H, N, N].
    """
    suffix = "" if mask is None else ", masked"
    names = [(rung, name) for rung, arrays in ours.items() for name in arrays]
    rows: dict[tuple[str, str], Row] = {}

    def compare(rung: str, name: str, theirs: np.ndarray) -> None:
        # Of a module that is called several times the first call counts.
        own = ours[rung].pop(name, None)
        if own is None:
            return
        if twins.own and own.shape != theirs.shape:
            raise TorchModelError(
                f"{name}: the module's output has shape {theirs.shape}, must be {own.shape}"
            )
        rows[rung, name] = compare_arrays(rung + suffix, name, own, theirs)

    _visit(twins, mask, _visitors(twins, compare))
    # Only somebody's own model may lack modules.
    assert twins.own or len(rows) == len(names), [name for name in names if name not in rows]
    return [rows[name] for name in names if name in rows]


Visitor = Callable[[Any], None]


def first_tensor(output: Any, name: str, dtype: str) -> torch.Tensor:
    """Returns a module's output, or the first of several.

    Raises:
      TorchModelError: if it is no tensor of the dtype; the message names the module.
    """
    first = output[0] if isinstance(output, (list, tuple)) and output else output
    if isinstance(first, torch.Tensor) and first.dtype == getattr(torch, dtype):
        return first
    found = str(first.dtype) if isinstance(first, torch.Tensor) else f"a {type(first).__name__}"
    raise TorchModelError(f"{name}: the module's output is {found}, must be torch.{dtype}")


def _visitors(
    twins: Twins, compare: Callable[[str, str, np.ndarray], None]
) -> dict[str, list[Visitor]]:
    """Returns what is done with the output of each PyTorch module, by the module's name."""
    cfg = twins.cfg
    torch_model = family_of(cfg).torch_model
    visitors: dict[str, list[Visitor]] = {}

    def add(module: str, rung: str, name: str, slope: float = 1.0) -> None:
        def visit(output: Any) -> None:
            array = first_tensor(output, name, twins.dtype).numpy(force=True)
            # Flax's norms compute the activation that follows as well.
            compare(rung, name, array if slope == 1 else np.where(array > 0, array, slope * array))

        visitors.setdefault(module, []).append(visit)

    for pair in by_depth(cfg):
        add(pair.torch_name, "activations", pair.torch_name, negative_slope(pair, cfg))
        if pair.kind == "attention":
            dropout = f"{pair.torch_name}.{torch_model.attention_dropout}"
            add(dropout, "attention maps", pair.torch_name)
    for name in torch_model.stages:
        add(name, "decoder stages", name)
    for name in ("logits", PREDICTED):
        add("", "logits", name)

    def visit_features(output: Any) -> None:
        for name, skip in _features(output, twins).items():
            compare("skip features", name, first_tensor(skip, name, twins.dtype).numpy(force=True))

    visitors.setdefault(torch_model.encoder, []).append(visit_features)
    return visitors


def _features(output: Any, twins: Twins) -> dict[str, torch.Tensor]:
    """Finds the four features in what the encoder returned; somebody's own may return others."""
    cfg = twins.cfg
    shape = (len(twins.image), cfg.num_patches, cfg.hidden_size)
    try:
        skips = list(family_of(cfg).torch_model.features(output, cfg))
    except (AttributeError, LookupError, TypeError, ValueError):
        if not twins.own:
            raise
        return {}
    alike = all(isinstance(skip, torch.Tensor) and skip.shape == shape for skip in skips)
    if twins.own and not (alike and len(skips) == len(cfg.skip_layers)):
        return {}
    return {f"z{layer}": skip for layer, skip in zip(cfg.skip_layers, skips, strict=True)}


def _visit(twins: Twins, mask: np.ndarray | None, visitors: dict[str, list[Visitor]]) -> None:
    """Runs the PyTorch model and visits the outputs of its modules; "" is the whole model."""
    handles = []
    for name, module in named_modules(twins.torch_model, twins.prefix):

        def visit(module, args, output, name=name):
            for visitor in visitors[name]:
                visitor(output)

        if name in visitors:
            handles.append(module.register_forward_hook(visit))
    options = {} if mask is None else {"mask": torch.from_numpy(mask)}
    try:
        with torch.no_grad(), ConvolutionsInSlabs():
            twins.torch_model(channels_first_tensor(twins.image), **options)
    finally:
        for handle in handles:
            handle.remove()


def forward(
    cfg: UNETRConfig,
    model: UNETR,
    variables: Any,
    image: jax.Array,
    mask: np.ndarray | None = None,
) -> Any:
    """Evaluates the Flax model and returns its outputs as a tree of arrays, under `jax.jit` too.

    Args:
      cfg: the configuration.
      model: the model.
      variables: its variables.
      image: [B, *img_size, in_channels].
      mask: boolean attention mask [B, H, N, N].
    """
    (logits, skips, attention), state = model.apply(
        variables,
        image,
        mask=mask,
        return_skips=True,
        return_attention=True,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    calls: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(state["intermediates"])
    # Modules that share a path record their outputs there, the outermost module last.
    last = {path[:-1]: outputs[-1] for path, outputs in calls.items()}
    found = {
        "modules": {pair.torch_name: last[pair.flax_path] for pair in by_depth(cfg)},
        "skips": skips,
        "attention": attention,
        "stages": [last["decoder", f"stage_{i}"] for i in range(NUM_STAGES)],
        "logits": logits,
    }
    heads = jax.ShapeDtypeStruct(
        (len(image), cfg.num_patches, cfg.num_heads, cfg.head_dim), image.dtype
    )
    if not ops.attention_is_plain(heads, heads, mask, lowering=model.lowering):
        found["predicted"] = model.apply(variables, image)
    return found


def flax_found(cfg: UNETRConfig, tree: Any) -> Found:
    """Returns the outputs that `forward` returned in PyTorch's layouts."""
    pairs = list(by_depth(cfg))
    blocks = [pair.torch_name for pair in pairs if pair.kind == "attention"]
    stages = family_of(cfg).torch_model.stages
    return {
        "activations": {
            pair.torch_name: in_torch_layout(tree["modules"][pair.torch_name], pair.kind, cfg)
            for pair in pairs
        },
        "skip features": {
            f"z{layer}": skip for layer, skip in zip(cfg.skip_layers, tree["skips"], strict=True)
        },
        "attention maps": dict(zip(blocks, tree["attention"], strict=True)),
        "decoder stages": {
            name: channels_first(stage) for name, stage in zip(stages, tree["stages"], strict=True)
        },
        "logits": {
            name: channels_first(tree[key])
            for name, key in (("logits", "logits"), (PREDICTED, "predicted"))
            if key in tree
        },
    }


def negative_slope(pair: ModulePair, cfg: UNETRConfig) -> float:
    """Returns the slope of the LeakyReLU that Flax's norm applies after PyTorch's, 1 for none."""
    if pair.kind == "batch_norm":
        return 0.0
    followed = ("norm1", "norm2") if cfg.block_style.block == "basic" else ("norm1",)
    return (
        LEAKY_RELU_SLOPE if pair.kind == "channel_norm" and pair.flax_path[-1] in followed else 1.0
    )


def by_depth(cfg: UNETRConfig) -> Iterator[ModulePair]:
    """Yields the modules to compare, outer before inner, block by block."""
    qkv = family_of(cfg).torch_model.qkv
    for pair in module_pairs(cfg):
        if pair.kind not in WRAPPERS:
            yield pair
        if pair.kind == "attention" and not isinstance(qkv, str):
            for name, kind in zip(qkv, QKV_KINDS, strict=True):
                yield ModulePair(f"{pair.torch_name}.{name}", (*pair.flax_path, "qkv"), kind)


def in_torch_layout(x: Any, kind: str, cfg: UNETRConfig) -> np.ndarray:
    """Returns the output of a Flax module of some kind in the layout of PyTorch's module."""
    # Attention returns a pair of output and weights.
    x = np.asarray(x[0] if isinstance(x, tuple) else x)
    if kind == "qkv":
        return einops.rearrange(x, f"b n qkv h d -> b n {family_of(cfg).torch_model.qkv}")
    if kind in QKV_KINDS:
        return einops.rearrange(x[:, :, QKV_KINDS.index(kind)], "b n h d -> b n (h d)")
    if kind == "perceptron_embedding":
        return x.reshape(len(x), cfg.num_patches, cfg.hidden_size)
    return x if kind in TOKEN_KINDS else channels_first(x)
