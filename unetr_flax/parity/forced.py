"""Run of the Flax model in which every module gets the PyTorch model's inputs.

Each module's input and result are replaced by those that PyTorch has at that place, after they have
been noted. So whatever differs differs by the module itself, or by what stands between two modules,
and one fault does not smear over all that follows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.activations import negative_slope
from unetr_flax.parity.places import ALL_PARTS, LAST_PART, belongs, find_places, from_flax, to_flax
from unetr_flax.parity.record import Recording
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.twins import Twins
from unetr_flax.weights.mapping import ModulePair

# Classes of modules that add their input to a later result, so that it is replaced, too.
RESIDUAL = ("TransformerBlock", "UNetBlock")


def run_forced(
    twins: Twins,
    recording: Recording,
    mask: np.ndarray | None = None,
    *,
    train: bool = False,
    parts: frozenset[str] = ALL_PARTS,
) -> tuple[Recording, Any]:
    """Runs the Flax model on the inputs that the PyTorch model's modules had.

    Args:
      twins: both models.
      recording: PyTorch's forward pass.
      mask: boolean attention mask [B, H, N, N].
      train: whether the model runs in training mode.
      parts: the parts that were recorded, of `places.parts_of`. What only others need
        is not computed.

    Returns:
      What each module and each block of the Flax model was given before it was replaced, and what
      it computed, in the common form; and the running statistics, updated if `train`.
    """
    cfg = twins.cfg
    leaves, blocks = find_places(cfg)
    inputs, outputs = {}, {}
    for path, place in leaves.items():
        if path in recording.inputs:
            inputs[path] = to_flax(recording.inputs[path], place.kind, cfg, output=False)
            value = recording.outputs[path]
            outputs[path] = to_flax(_activated(value, path, cfg), place.kind, cfg, output=True)
    for path, place in blocks.items():
        if path in recording.outputs:
            outputs[path] = to_flax(recording.outputs[path], place.kind, cfg, output=True)
            key, value = f"{path} block", recording.inputs[path]
            inputs[key] = to_flax(value, _kind_of_input(key, cfg), cfg, output=False)
    for i in range(cfg.num_layers):
        path, following = f"encoder/block_{i}", f"encoder/block_{i + 1}/norm1"
        if f"{path}/norm1" in recording.inputs:
            inputs[f"{path} block"] = recording.inputs[f"{path}/norm1"]
        value = recording.inputs.get(following)
        if i == cfg.num_layers - 1:
            value = recording.stream
        if value is not None:
            outputs[path] = value
    model: Any = twins.model
    program = _program(model, train, parts)
    given, made, statistics = program(twins.variables, twins.image, inputs, outputs, mask)
    logits = made.pop("logits", np.zeros_like(np.moveaxis(recording.logits, 1, -1)))
    ours = Recording({}, {}, None, {}, from_flax(logits, "conv", cfg, output=True))
    for path, value in given.items():
        ours.inputs[path] = from_flax(value, _kind_of_input(path, cfg), cfg, output=False)
    for path, value in made.items():
        kind = leaves[path].kind if path in leaves else "conv" if path in blocks else "norm"
        ours.outputs[path] = from_flax(value, kind, cfg, output=True)
    return ours, statistics


def _kind_of_input(key: str, cfg: UNETRConfig) -> str:
    """Returns the kind of module whose input has the layout of an entry of the inputs."""
    leaves, blocks = find_places(cfg)
    path = key.removesuffix(" block")
    if key in leaves:
        return leaves[key].kind
    if path not in blocks:
        return "norm"
    return "fuse_conv" if "fuse" in blocks[path].kind else "conv"


def _activated(value: np.ndarray, path: str, cfg: UNETRConfig) -> np.ndarray:
    """Applies the activation that Flax's norms compute as well."""
    slope = slope_after(path, cfg)
    return (
        value if slope == 1 else np.where(value > 0, value, np.asarray(slope, value.dtype) * value)
    )


def slope_after(path: str, cfg: UNETRConfig) -> float:
    """Returns the slope of the LeakyReLU that Flax's module at a path ends with, 1 for none."""
    place = find_places(cfg)[0][path]
    return negative_slope(ModulePair(place.torch[0], tuple(path.split("/")), place.kind), cfg)


@functools.lru_cache(maxsize=8)
def _program(model: Any, train: bool, parts: frozenset[str]) -> Any:
    """Makes the program; compiled once for all comparisons with the same model."""
    leaves, blocks = find_places(model.config)
    streams = {f"encoder/block_{i}" for i in range(model.config.num_layers)}

    def run(
        variables: Any,
        image: jax.Array,
        inputs: Mapping[str, jax.Array],
        outputs: Mapping[str, jax.Array],
        mask: jax.Array | None,
    ) -> Any:
        given, made, active = {}, {}, set()

        def intercept(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            key = path
            if type(context.module).__name__ in RESIDUAL:
                key = f"{path} block"
            outermost = path not in active
            if key != path or (outermost and path in leaves):
                given[key] = args[0]
                args = (inputs.get(key, args[0]), *args[1:])
            if not outermost or (path not in leaves | blocks and path not in streams):
                return call(*args, **kwargs)
            active.add(path)
            result = call(*args, **kwargs)
            active.remove(path)
            first, *rest = result if isinstance(result, tuple) else (result,)
            made[path] = first
            first = outputs.get(path, first)
            return (first, *rest) if isinstance(result, tuple) else first

        with nn.intercept_methods(intercept):
            (logits, _, _), state = model.apply(
                variables,
                image,
                train=train,
                mask=mask,
                return_skips=True,
                return_attention=True,
                mutable=["batch_stats"],
            )
        # The compiler leaves out what is not returned.
        given, made = (
            {key: x for key, x in of.items() if belongs(key.removesuffix(" block"), parts)}
            for of in (given, made)
        )
        if LAST_PART in parts:
            made["logits"] = logits
        return given, made, state.get("batch_stats", {})

    return jit_to_run_once(run)
