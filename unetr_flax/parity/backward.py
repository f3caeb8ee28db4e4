"""Diagnosis of a backward pass, module by module.

Each module of the Flax model gets the gradient that the PyTorch model has at its output, and what
it makes of it is noted. So what differs differs by the module itself, or by what stands between two
modules, and one fault does not smear over all that the backward pass reaches after it.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.diagnose import SIDES, Finding, explain_sites
from unetr_flax.parity.forced import slope_after
from unetr_flax.parity.places import (
    EMBEDDING,
    Place,
    find_places,
    from_flax,
    from_torch_output,
    to_flax,
)
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.sites import Site
from unetr_flax.parity.twins import Twins, channels_first, channels_first_tensor, named_modules
from unetr_flax.weights import to_torch

# Gradients smaller than this part of the largest one are zero except for rounding.
NEGLIGIBLE = 1e-12

# Gradients of a loss of the logits by PyTorch's logits.
Loss = Callable[[torch.Tensor], torch.Tensor]
Named = dict[str, np.ndarray]


@dataclasses.dataclass
class Gradients:
    """Gradients of a loss, arrays in the common form of `places`.

    Attributes:
      inputs: by the input of each module, as far as it acts through this module; by Flax path.
      outputs: by the output of each module; by Flax path.
      streams: by the residual stream after each transformer block but the last; by Flax path.
      parameters: by the parameters, by PyTorch's names.
      image: by the image [B, C, *img_size].
    """

    inputs: Named
    outputs: Named
    streams: Named
    parameters: Named
    image: np.ndarray


def diagnose_backward(
    twins: Twins, loss: Loss, *, train: bool = False, sides: tuple[str, str] = SIDES
) -> list[Finding]:
    """Compares the backward passes of both models module by module, and names the causes.

    Forward passes are taken to agree; see `diagnose`.

    Args:
      twins: both models, small ones, as all gradients are held; call within `precise()`.
      loss: PyTorch's loss of the logits [B, K, *img_size].
      train: whether both run in training mode, without dropout.
      sides: names of the two models in the findings.

    Returns:
      The modules whose gradients differ by themselves, in the order of the backward pass.
    """
    theirs, logits = _record(twins, loss, train)
    ours = _run_forced(twins, theirs, logits, train)
    sites = [site for site in _sites(twins.cfg, ours, theirs) if not _is_zero(site, theirs)]
    return explain_sites(sites, twins.dtype, sides)


def _record(twins: Twins, loss: Loss, train: bool) -> tuple[Gradients, np.ndarray]:
    """Runs PyTorch's backward pass; returns its gradients, and that by the logits."""
    cfg = twins.cfg
    leaves, _ = find_places(cfg)
    names = {name for place in leaves.values() for name in place.torch}
    kept: dict[str, dict[str, np.ndarray]] = {"into": {}, "through": {}, "out": {}}

    def keep(kind: str, name: str, x: torch.Tensor) -> None:
        x.register_hook(lambda gradient: kept[kind].update({name: gradient.numpy().copy()}))

    def enter(module: Any, args: Any, name: str) -> Any:
        if not args or not args[0].requires_grad:
            return None
        # All that uses a tensor adds to its gradient; through a view of its own comes the module's.
        view = args[0].view_as(args[0])
        keep("into", name, args[0])
        keep("through", name, view)
        return (view, *args[1:])

    def leave(module: Any, args: Any, output: Any, name: str) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            keep("out", name, output)

    model = copy.deepcopy(twins.torch_model).train(train)
    model.zero_grad()
    for name, module in named_modules(model, twins.prefix):
        if name in names:
            module.register_forward_pre_hook(functools.partial(enter, name=name))
            module.register_forward_hook(functools.partial(leave, name=name))
    image: Any = channels_first_tensor(twins.image).requires_grad_()
    logits = model(image)
    logits.retain_grad()
    loss(logits).backward()
    parameters = {
        name.removeprefix(twins.prefix): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    found = Gradients({}, {}, {}, parameters, image.grad.numpy())
    for path, place in leaves.items():
        if path != EMBEDDING and all(name in kept["through"] for name in place.torch):
            found.inputs[path] = np.sum([kept["through"][name] for name in place.torch], axis=0)
        if slope_after(path, cfg) == 1 and all(name in kept["out"] for name in place.torch):
            arrays = [kept["out"][name] for name in place.torch]
            found.outputs[path] = from_torch_output(arrays, place, cfg)
    for i in range(1, cfg.num_layers):
        norm = leaves[f"encoder/block_{i}/norm1"].torch[0]
        if norm in kept["into"]:
            found.streams[f"encoder/block_{i - 1}"] = kept["into"][norm]
    return found, logits.grad.numpy()


def _run_forced(twins: Twins, theirs: Gradients, logits: np.ndarray, train: bool) -> Gradients:
    """Runs Flax's backward pass, with PyTorch's gradients in the place of those that arrive."""
    cfg = twins.cfg
    kinds = {path: place.kind for path, place in find_places(cfg)[0].items()}
    # Whether the places of each field of `Gradients` are outputs, and their gradients there.
    places = {"inputs": (False, theirs.inputs), "outputs": (True, theirs.outputs)}
    forced: Any = {
        field: {p: to_flax(x, kinds[p], cfg, output=output) for p, x in gradients.items()}
        for field, (output, gradients) in places.items()
    }
    forced["streams"] = theirs.streams
    model: Any = twins.model
    program = _program(model, train)
    params, image, found = program(twins.variables, twins.image, np.moveaxis(logits, 1, -1), forced)
    common = {
        field: {p: from_flax(x, kinds[p], cfg, output=output) for p, x in found[field].items()}
        for field, (output, _) in places.items()
    }
    streams = {path: np.asarray(x) for path, x in found["streams"].items()}
    parameters = to_torch({"params": params}, cfg)
    return Gradients(**common, streams=streams, parameters=parameters, image=channels_first(image))


@functools.lru_cache(maxsize=8)
def _program(model: Any, train: bool) -> Any:
    """Makes the program; compiled once for all comparisons with the same model."""
    leaves, _ = find_places(model.config)

    def run(variables: Any, image: jax.Array, logits: jax.Array, forced: Any) -> Any:
        active = set()

        def weighted(params: Any, image: jax.Array, arriving: Any) -> jax.Array:
            terms = []

            def exchanged(kind: str, path: str, x: jax.Array) -> jax.Array:
                if path not in forced[kind]:
                    return x
                # The gradient by x is the forced one, and that by the result is noted.
                terms.append((forced[kind][path] * x).sum())
                return jax.lax.stop_gradient(x) + arriving[kind][path]

            def intercept(call, args, kwargs, context):
                path = "/".join(context.module.path)
                if context.method_name != "__call__" or path in active:
                    return call(*args, **kwargs)
                if path not in leaves and path not in forced["streams"]:
                    return call(*args, **kwargs)
                active.add(path)
                result = call(exchanged("inputs", path, args[0]), *args[1:], **kwargs)
                active.remove(path)
                first, *rest = result if isinstance(result, tuple) else (result,)
                first = exchanged("outputs", path, exchanged("streams", path, first))
                return (first, *rest) if isinstance(result, tuple) else first

            with nn.intercept_methods(intercept):
                made, _ = model.apply(
                    {**variables, "params": params}, image, train=train, mutable=["batch_stats"]
                )
            return sum(terms, (made * logits).sum())

        zeros = jax.tree.map(jnp.zeros_like, forced)
        return jax.grad(weighted, argnums=(0, 1, 2))(variables["params"], image, zeros)

    return jit_to_run_once(run)


def _sites(cfg: UNETRConfig, ours: Gradients, theirs: Gradients) -> Iterator[Site]:
    """Yields what is compared, in the order of the backward pass."""
    leaves, _ = find_places(cfg)
    left = dict.fromkeys(theirs.parameters)

    def site(name: str, what: str, ours: Mapping, theirs: Mapping, key: str) -> Iterator[Site]:
        if key in theirs and key in ours:
            yield Site(name, what, "gradient", {"x": theirs[key]}, {}, ours[key], theirs[key])

    for path, place in reversed(leaves.items()):
        yield from site(place.name, "gradient by its output", ours.outputs, theirs.outputs, path)
        for name in _parameters_of(place, theirs.parameters):
            left.pop(name)
            yield from site(name, "gradient", ours.parameters, theirs.parameters, name)
        yield from site(place.name, "gradient by its input", ours.inputs, theirs.inputs, path)
        block, _, leaf = path.rpartition("/")
        if leaf == "norm1" and block.startswith("encoder/block_"):
            before = f"encoder/block_{int(block.rpartition('_')[2]) - 1}"
            what = "gradient by the residual stream before it"
            yield from site(place.name, what, ours.streams, theirs.streams, before)
    for name in left:
        yield from site(name, "gradient", ours.parameters, theirs.parameters, name)
    yield Site("image", "gradient", "gradient", {"x": theirs.image}, {}, ours.image, theirs.image)


def _parameters_of(place: Place, parameters: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name in parameters if name.rpartition(".")[0] in place.torch]


def _is_zero(site: Site, theirs: Gradients) -> bool:
    """Returns whether both gradients are zero except for rounding."""
    largest = max(float(np.abs(gradient).max()) for gradient in theirs.parameters.values())
    # Negated where nan is not negligible.
    return bool(max(np.abs(g).max() for g in (site.ours, site.theirs)) <= NEGLIGIBLE * largest)
