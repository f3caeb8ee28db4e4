"""Rungs of one forward pass: the output of every module, the four skip features, the logits."""

from collections.abc import Iterator
from typing import Any

import einops
import jax
import numpy as np
import torch
from flax import traverse_util

from parity_tests.compare import Row, compare
from parity_tests.twins import Twins, channels_first, to_tensor
from unetr_flax.weights.mapping import ModulePair, module_pairs

# Kinds whose outputs are tokens [B, N, ...]; all others work on grids, channels last in Flax.
TOKEN_KINDS = ("embedding", "attention", "norm", "feed_forward", "linear", "qkv", "projection")

# The decoder's stages by the PyTorch modules that end them.
STAGES = (
    "decoder9_upsampler.2",
    "decoder6_upsampler.1",
    "decoder3_upsampler.1",
    "decoder0_header.1",
)


def torch_outputs(twins: Twins, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Output of every PyTorch module by name in one evaluation; the whole model's is "" """
    outputs: dict[str, np.ndarray] = {}
    handles = []
    for name, module in twins.torch_model.named_modules():

        def keep(module, args, output, name=name):
            if isinstance(output, torch.Tensor):
                outputs[name] = output.numpy()

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        twins.torch_model(to_tensor(twins.image), mask=None if mask is None else torch.tensor(mask))
    for handle in handles:
        handle.remove()
    return outputs


def flax_outputs(
    twins: Twins, mask: np.ndarray | None = None
) -> tuple[dict[tuple[str, ...], np.ndarray], tuple[np.ndarray, ...]]:
    """Output of every Flax module by path in one jitted evaluation, and the four skip features."""

    def forward(variables: Any, image: jax.Array):
        return twins.model.apply(
            variables,
            image,
            mask=mask,
            return_skips=True,
            capture_intermediates=True,
            mutable=["intermediates"],
        )

    (_, skips), state = jax.jit(forward)(twins.variables, twins.image)
    flat = traverse_util.flatten_dict(state["intermediates"])
    # The last call recorded at a path is the outermost module's.
    return {path[:-1]: calls[-1] for path, calls in flat.items()}, skips


def activation_rows(twins: Twins, mask: np.ndarray | None = None) -> list[Row]:
    """One row per module of both models, in order of depth, then skips, stages and logits."""
    theirs = torch_outputs(twins, mask)
    ours, skips = flax_outputs(twins, mask)
    rung = "activations" if mask is None else "activations, masked"
    rows = [
        compare(
            rung,
            pair.torch_name,
            _in_torch_layout(ours[pair.flax_path], pair),
            theirs[pair.torch_name],
        )
        for pair in _by_depth(twins)
    ]
    rung = "skip features" if mask is None else "skip features, masked"
    with torch.no_grad():
        features = twins.torch_model.encode(
            to_tensor(twins.image), mask=None if mask is None else torch.tensor(mask)
        )
    rows += [
        compare(rung, f"z{layer}", skip, feature.numpy())
        for layer, skip, feature in zip(twins.cfg.skip_layers, skips, features, strict=True)
    ]
    rung = "decoder stages" if mask is None else "decoder stages, masked"
    rows += [
        compare(rung, name, channels_first(ours["decoder", f"stage_{i}"]), theirs[name])
        for i, name in enumerate(STAGES)
    ]
    rung = "logits" if mask is None else "logits, masked"
    logits = ours[()][0]
    return [*rows, compare(rung, "logits", channels_first(logits), theirs[""])]


def _by_depth(twins: Twins) -> Iterator[ModulePair]:
    # Outer modules of the same computation say nothing that their parts do not.
    for pair in module_pairs(twins.cfg):
        if pair.kind not in ("single_conv", "single_deconv"):
            yield pair


def _in_torch_layout(x: np.ndarray, pair: ModulePair) -> np.ndarray:
    x = np.asarray(x)
    if pair.kind == "qkv":
        return einops.rearrange(x, "b n qkv h d -> b n (h d qkv)")
    return x if pair.kind in TOKEN_KINDS else channels_first(x)
