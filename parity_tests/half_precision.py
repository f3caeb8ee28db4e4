"""The rung of half precision: errors in bfloat16 and float16 beside those of PyTorch's autocast.

Errors of this kind are random: two computations of equal quality differ in single numbers by any
factor, and a ReLU that one of them switches changes all gradients before it. So errors are norms of
whole arrays, relative to the arrays, and their means over several images and over all parameters of
a part of the model are compared.
"""

import collections
import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.gradients import NEGLIGIBLE, canceled
from parity_tests.ratio_rows import RatioRow
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.twins import Twins, channels_first, channels_first_tensor
from unetr_flax.weights import to_torch
from unetr_flax.weights.families import family_of

DTYPES = ("bfloat16", "float16")
# Our error may be this many times that of PyTorch's autocast.
TOLERANCE = 1.1
# Images over which errors are averaged.
IMAGES = 16
# Standard deviation of the logits' cotangents: neither they nor sums over voxels leave the range of
# float16, which training in float16 ensures by scaling the loss.
COTANGENT = 1 / 16


Named = dict[str, np.ndarray]


class Results(NamedTuple):
    """Results of one model for one image, in float64 and in PyTorch's layouts.

    Attributes:
      outputs: logits and skip features by name.
      gradients: gradients of a weighted sum of logits by parameters' names, and of "image".
    """

    outputs: Named
    gradients: Named


def half_precision_rows(
    twins: Twins, images: int = IMAGES, dtypes: Sequence[str] = DTYPES
) -> list[RatioRow]:
    """Compares the errors of both models in half precision, with parameters in float32.

    The exact numbers are those of PyTorch's model in float64. Gradients are those of a randomly
    weighted sum of logits, in evaluation mode.

    Args:
      twins: both models, in float64.
      images: number of images, of one volume each.
      dtypes: names of the dtypes.
    """
    cfg = twins.cfg
    rng = np.random.default_rng(2)
    shapes = (1, *cfg.img_size, cfg.in_channels), (1, *cfg.img_size, cfg.out_channels)
    inputs = [
        (rng.standard_normal(shapes[0]), COTANGENT * rng.standard_normal(shapes[1]))
        for _ in range(images)
    ]
    exact = [_torch_results(cfg, twins.torch_model, *pair, None) for pair in inputs]
    narrow = copy.deepcopy(twins.torch_model).float()
    idle = canceled(twins.torch_model, cfg)
    rows = []
    for dtype in dtypes:
        flax_results = _flax_function(twins, dtype)
        ours = [flax_results(*pair) for pair in inputs]
        theirs = [_torch_results(cfg, narrow, *pair, getattr(torch, dtype)) for pair in inputs]
        errors = [_errors(found, exact, idle) for found in (ours, theirs)]
        rows += [
            RatioRow("half precision", name, dtype, errors[0][name], errors[1][name], TOLERANCE)
            for name in errors[0]
        ]
    return rows


def _errors(found: list[Results], exact: list[Results], idle: Collection[str]) -> dict[str, float]:
    """Computes the mean relative error of each output, and of the gradients of each part.

    Args:
      found: results for each image.
      exact: the exact ones.
      idle: parameters whose gradients are zero except for rounding.
    """
    errors: dict[str, list[float]] = collections.defaultdict(list)
    for ours, truth in zip(found, exact, strict=True):
        for name, array in truth.outputs.items():
            errors[name].append(_relative(ours.outputs[name], array))
        largest = max(np.abs(array).max() for array in truth.gradients.values())
        for name, array in truth.gradients.items():
            if np.abs(array).max() > NEGLIGIBLE * largest and name not in idle:
                error = _relative(ours.gradients[name], array)
                errors[f"gradients, {_part(name)}"].append(error)
    return {name: float(np.mean(values)) for name, values in errors.items()}


def _relative(found: np.ndarray, exact: np.ndarray) -> float:
    """Computes ||found - exact|| / ||exact||."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _part(name: str) -> str:
    """Returns the part of the model that a parameter of any family belongs to."""
    if name == "image":
        return "image"
    return "encoder" if name.startswith(("embedding.", "transformer.", "vit.")) else "decoder"


def _flax_function(twins: Twins, dtype: str) -> Any:
    """Returns a function from an image and cotangents to the Flax model's results."""
    cfg = twins.cfg
    model = twins.model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.float32, jit_blocks=True)
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), twins.variables)

    def weighted_sum(params, image, cotangents):
        bound = {**variables, "params": params}
        logits, skips = model.apply(bound, image, return_skips=True)
        return (logits.astype(jnp.float32) * cotangents).sum(), (logits, skips)

    gradients = jit_to_run_once(jax.grad(weighted_sum, argnums=(0, 1), has_aux=True))

    def call(image, cotangents):
        with jax.enable_x64(False):
            arrays = (np.asarray(x, np.float32) for x in (image, cotangents))
            found = jax.device_get(gradients(variables["params"], *arrays))
        (params, image_grad), (logits, skips) = found
        named = {**to_torch({"params": params}, cfg), "image": channels_first(image_grad)}
        return _in_float64(cfg, channels_first(logits), skips, named)

    return call


def _torch_results(cfg, model, image, cotangents, dtype) -> Results:
    """Runs a PyTorch model forward and backward, in its own dtype or with autocast to another."""
    spec = family_of(cfg).torch_model
    wide = next(model.parameters()).dtype
    x = channels_first_tensor(image).to(wide).requires_grad_()
    outputs: list[Any] = []
    encoder = model.get_submodule(spec.encoder)
    handle = encoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(x)
            skips = spec.features(outputs[0], cfg)
    finally:
        handle.remove()
    (logits.to(wide) * channels_first_tensor(cotangents).to(wide)).sum().backward()
    named = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    image_grad: Any = x.grad
    named["image"] = image_grad.numpy()
    model.zero_grad()
    return _in_float64(
        cfg, logits.detach().to(wide).numpy(), [z.detach().to(wide).numpy() for z in skips], named
    )


def _in_float64(cfg, logits, skips, gradients) -> Results:
    skips = zip(cfg.skip_layers, skips, strict=True)
    outputs = {"logits": logits, **{f"skip feature z{layer}": skip for layer, skip in skips}}
    return Results(
        *(
            {name: np.asarray(array, np.float64) for name, array in arrays.items()}
            for arrays in (outputs, gradients)
        )
    )
