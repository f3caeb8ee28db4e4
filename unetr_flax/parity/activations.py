"""Rungs of one forward pass: output of every module, skip features, attention, stages, logits."""

from collections.abc import Iterator
from typing import Any

import einops
import jax
import numpy as np
import torch
from flax import traverse_util

from unetr_flax.model.blocks import LEAKY_RELU_SLOPE
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample
from unetr_flax.parity.compare import Row, compare
from unetr_flax.parity.twins import Twins, channels_first, to_tensor
from unetr_flax.weights.mapping import ModulePair, module_pairs

# Kinds whose outputs are tokens [B, N, ...]; all others work on grids, channels last in Flax.
TOKEN_KINDS = ("embedding", "attention", "norm", "feed_forward", "linear", "qkv", "projection")

# Outer modules of the same computation say nothing that their parts do not.
WRAPPERS = ("single_conv", "single_conv_of_join", "single_deconv", "head")

# How each family orders the features of a fused map to queries, keys and values; None for three
# maps of their own, which have these names.
QKV_ORDER = {"reference": "(h d qkv)", "monai": "(qkv h d)", "tamasino52": None}
QKV_NAMES = ("query", "key", "value")

# What the attention weights go through, in the attention module; it changes nothing in evaluation.
ATTENTION_DROPOUT = {
    "reference": "att_drop",
    "monai": "drop_weights",
    "tamasino52": "attn_dropout",
}

# The encoder, which returns its features, and the modules that end the decoder's stages.
ENCODER = {"reference": "transformer", "monai": "vit", "tamasino52": "transformer"}
CONV_STAGES = (
    "decoder9_upsampler.2",
    "decoder6_upsampler.1",
    "decoder3_upsampler.1",
    "decoder0_header.1",
)
STAGES = {
    "reference": CONV_STAGES,
    "monai": ("decoder5", "decoder4", "decoder3", "decoder2"),
    "tamasino52": CONV_STAGES,
}

# Arrays in PyTorch's layouts, by rung and then by PyTorch's name.
Found = dict[str, dict[str, np.ndarray]]


def activation_rows(twins: Twins, mask: np.ndarray | None = None) -> list[Row]:
    """One row per module of both models, in order of depth, then skips, attention, stages, logits.

    Args:
      twins: both models and their image.
      mask: attention mask [B, H, N, N] of the reference family; the others have none.
    """

    def evaluate(variables: Any, image: jax.Array) -> Any:
        return forward(twins.cfg, twins.model, variables, image, mask)

    ours = flax_found(twins.cfg, jax.jit(evaluate)(twins.variables, twins.image))
    return found_rows(ours, torch_found(twins, mask), "" if mask is None else ", masked")


def found_rows(ours: Found, theirs: Found, suffix: str = "") -> list[Row]:
    """All that both models give, compared; `suffix` goes to the rungs' names."""
    assert {k: list(v) for k, v in ours.items()} == {k: list(v) for k, v in theirs.items()}
    return [
        compare(rung + suffix, name, array, theirs[rung][name])
        for rung, arrays in ours.items()
        for name, array in arrays.items()
    ]


def torch_found(twins: Twins, mask: np.ndarray | None = None) -> Found:
    """What the PyTorch model gives in one evaluation."""
    cfg = twins.cfg
    attention = {
        f"{pair.torch_name}.{ATTENTION_DROPOUT[cfg.family]}": pair.torch_name
        for pair in module_pairs(cfg)
        if pair.kind == "attention"
    }
    modules = {pair.torch_name: negative_slope(pair, cfg) for pair in by_depth(cfg)}
    stages = STAGES[cfg.family]
    encoder = ENCODER[cfg.family]
    outputs = _outputs(twins, mask, {*modules, *stages, *attention, encoder, ""})
    if cfg.family == "monai":
        last, hidden = outputs[encoder]
        skips = [*(hidden[layer - 1] for layer in cfg.skip_layers[:-1]), last]
    else:
        skips = outputs[encoder]
    return {
        "activations": {
            name: np.where(outputs[name] > 0, outputs[name], slope * outputs[name])
            for name, slope in modules.items()
        },
        "skip features": {
            f"z{layer}": skip for layer, skip in zip(cfg.skip_layers, skips, strict=True)
        },
        "attention maps": {name: outputs[key] for key, name in attention.items()},
        "decoder stages": {name: outputs[name] for name in stages},
        "logits": {"logits": outputs[""]},
    }


def _outputs(twins: Twins, mask: np.ndarray | None, names: set[str]) -> dict[str, Any]:
    """Outputs of some PyTorch modules by name; the whole model's is "" """
    outputs: dict[str, Any] = {}
    handles = []
    for name, module in twins.torch_model.named_modules():
        if name in names:

            def keep(module, args, output, name=name):
                outputs[name] = _copied(output)

            handles.append(module.register_forward_hook(keep))
    options = {} if mask is None else {"mask": torch.from_numpy(mask)}
    with torch.no_grad():
        twins.torch_model(to_tensor(twins.image), **options)
    for handle in handles:
        handle.remove()
    return outputs


def _copied(output: Any) -> Any:
    # A module after this one may write its own output over it.
    if isinstance(output, torch.Tensor):
        return output.numpy(force=True).copy()
    return [_copied(part) for part in output]


def forward(
    cfg: UNETRConfig,
    model: UNETR,
    variables: Any,
    image: jax.Array,
    mask: np.ndarray | None = None,
) -> Any:
    """What the Flax model gives in one evaluation, as a tree of arrays that `jax.jit` can return.

    Args:
      cfg: the configuration.
      model: the model.
      variables: its variables.
      image: [B, *img_size, in_channels].
      mask: attention mask [B, H, N, N].
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
    calls = traverse_util.flatten_dict(state["intermediates"])
    # The last call recorded at a path is the outermost module's.
    last = {path[:-1]: _computed(outputs[-1]) for path, outputs in calls.items()}
    return {
        "modules": {pair.torch_name: last[pair.flax_path] for pair in by_depth(cfg)},
        "skips": skips,
        "attention": attention,
        "stages": [last["decoder", f"stage_{i}"] for i in range(len(CONV_STAGES))],
        "logits": logits,
    }


def _computed(output: Any) -> Any:
    """What a module gave, as an array if it is one not computed yet."""
    return output.array() if isinstance(output, DeferredNorm | DeferredUpsample) else output


def flax_found(cfg: UNETRConfig, tree: Any) -> Found:
    """What `forward` returned, in PyTorch's layouts."""
    pairs = list(by_depth(cfg))
    blocks = [pair.torch_name for pair in pairs if pair.kind == "attention"]
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
            name: channels_first(stage)
            for name, stage in zip(STAGES[cfg.family], tree["stages"], strict=True)
        },
        "logits": {"logits": channels_first(tree["logits"])},
    }


def negative_slope(pair: ModulePair, cfg: UNETRConfig) -> float:
    """Of the LeakyReLU after a PyTorch norm that is a part of Flax's norm; 1 for none."""
    if pair.kind == "batch_norm":
        return 0.0
    followed = ("norm1", "norm2") if cfg.block_style.block == "basic" else ("norm1",)
    return (
        LEAKY_RELU_SLOPE if pair.kind == "channel_norm" and pair.flax_path[-1] in followed else 1.0
    )


def by_depth(cfg: UNETRConfig) -> Iterator[ModulePair]:
    """The modules to compare, outer before inner, block by block."""
    for pair in module_pairs(cfg):
        if pair.kind not in WRAPPERS:
            yield pair
        if pair.kind == "attention" and QKV_ORDER[cfg.family] is None:
            for name in QKV_NAMES:
                yield ModulePair(f"{pair.torch_name}.{name}", (*pair.flax_path, "qkv"), name)


def in_torch_layout(x: Any, kind: str, cfg: UNETRConfig) -> np.ndarray:
    """The output of a Flax module of some kind as PyTorch's module gives it."""
    # Attention gives its weights too.
    x = np.asarray(x[0] if isinstance(x, tuple) else x)
    if kind == "qkv":
        return einops.rearrange(x, f"b n qkv h d -> b n {QKV_ORDER[cfg.family]}")
    if kind in QKV_NAMES:
        return einops.rearrange(x[:, :, QKV_NAMES.index(kind)], "b n h d -> b n (h d)")
    if kind == "perceptron_embedding":
        return x.reshape(len(x), cfg.num_patches, cfg.hidden_size)
    return x if kind in TOKEN_KINDS else channels_first(x)
