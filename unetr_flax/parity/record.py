"""Recording of a PyTorch model's forward pass: what enters and leaves each module."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.places import ALL_PARTS, EMBEDDING, belongs, find_places, from_torch_output
from unetr_flax.parity.slabs import ConvolutionsInSlabs
from unetr_flax.parity.twins import Twins, channels_first_tensor, named_modules
from unetr_flax.weights.families import family_of
from unetr_flax.weights.mapping import module_pairs


@dataclasses.dataclass
class Recording:
    """A forward pass of the PyTorch model, arrays in the common form of `places`.

    Attributes:
      inputs: inputs of modules by Flax path.
      outputs: their outputs.
      stream: the residual stream after the last transformer block [B, N, E].
      dropped: attention weights after their dropout, by the path of the attention module.
      logits: [B, K, *img_size].
      positions: the table of position embeddings [1, N, E] in the PyTorch model, if it has one.
    """

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    stream: np.ndarray | None
    dropped: dict[str, np.ndarray]
    logits: np.ndarray
    positions: np.ndarray | None = None


def record(
    twins: Twins, mask: np.ndarray | None = None, parts: frozenset[str] = ALL_PARTS
) -> Recording:
    """Runs the PyTorch model and records its modules; those that it has not are left out.

    Args:
      twins: both models and their image.
      mask: boolean attention mask [B, H, N, N], if the PyTorch model takes one.
      parts: the parts that are compared, of `places.parts_of`.
    """
    cfg = twins.cfg
    leaves, blocks = find_places(cfg)
    facts = family_of(cfg).torch_model
    places = {**leaves, **blocks}
    places = {path: place for path, place in places.items() if belongs(path, parts)}
    embedding, attention = "", {}
    for pair in module_pairs(cfg):
        if pair.kind == "embedding":
            embedding = pair.torch_name
        elif pair.kind == "attention":
            attention["/".join(pair.flax_path)] = f"{pair.torch_name}.{facts.attention_dropout}"
    names = {name for place in places.values() for name in place.torch}
    names |= {embedding, facts.encoder, "", *attention.values()}
    options = {} if mask is None else {"mask": torch.from_numpy(mask)}
    with torch.no_grad(), ConvolutionsInSlabs(), _hooks(twins, names) as (inputs, outputs):
        twins.torch_model(channels_first_tensor(twins.image), **options)
    found = Recording({}, {}, None, {}, outputs[""])
    for path, place in places.items():
        if all(name in outputs for name in place.torch):
            found.inputs[path] = inputs[place.torch[0]]
            # Attention may return its weights as well.
            arrays = [
                outputs[name][0] if isinstance(outputs[name], list) else outputs[name]
                for name in place.torch
            ]
            found.outputs[path] = from_torch_output(arrays, place, cfg)
    if embedding in inputs:
        # The linear map of patches gets them flattened, so the image is taken further outside.
        found.inputs[EMBEDDING] = inputs[embedding]
    found.dropped = {path: outputs[name] for path, name in attention.items() if name in outputs}
    for name, table in twins.torch_model.state_dict().items():
        if name.startswith(twins.prefix) and name.endswith(".position_embeddings"):
            found.positions = table.numpy(force=True)
    found.stream = _last_stream(found, outputs.get(facts.encoder), cfg)
    return found


def _last_stream(found: Recording, encoded: Any, cfg: UNETRConfig) -> np.ndarray | None:
    if cfg.family_spec.final_norm:
        return found.inputs.get("encoder/norm")
    try:
        stream = family_of(cfg).torch_model.features(encoded, cfg)[-1]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    shape = (len(found.logits), cfg.num_patches, cfg.hidden_size)
    return stream if getattr(stream, "shape", None) == shape else None


@contextlib.contextmanager
def _hooks(twins: Twins, names: set[str]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Records the first inputs and the outputs of the modules of these names while entered."""
    inputs: dict[str, np.ndarray] = {}
    outputs: dict[str, Any] = {}
    handles = []
    for name, module in named_modules(twins.torch_model, twins.prefix):
        if name not in names:
            continue

        def enter(module, args, name=name):
            if args:
                inputs[name] = copied(args[0])

        def leave(module, args, output, name=name):
            outputs[name] = copied(output)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def copied(output: Any) -> Any:
    """Copies tensors to arrays, since a later module may overwrite them in place."""
    if isinstance(output, torch.Tensor):
        return output.numpy(force=True).copy()
    if isinstance(output, (list, tuple)):
        return [copied(part) for part in output]
    return output
