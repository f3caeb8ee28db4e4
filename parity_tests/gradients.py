"""The ladder's rungs of one backward pass: gradients and, in training mode, running statistics."""

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from parity_tests.torch_loss import dice_cross_entropy as torch_loss
from train.losses import dice_cross_entropy_loss
from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.activations import compared_rows, flax_found, forward
from unetr_flax.parity.backward import NEGLIGIBLE, diagnose_backward
from unetr_flax.parity.diagnose import Finding
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.run_once import run_once
from unetr_flax.parity.training import explain_gradients, explain_loss
from unetr_flax.parity.twins import Twins, channels_first, channels_first_tensor
from unetr_flax.weights import to_torch


def random_labels(twins: Twins, seed: int = 0) -> np.ndarray:
    """Draws a class for each voxel, int32 [B, *img_size]."""
    shape = twins.image.shape[:-1]
    return np.random.default_rng(seed).integers(0, twins.cfg.out_channels, shape, dtype=np.int32)


def gradient_rows(twins: Twins, *, train: bool) -> list[Row]:
    """Compares the loss and the gradients of every parameter and of the image.

    Args:
      twins: both models.
      train: whether both models run in training mode; then running statistics are compared too.
    """
    ours, theirs = backward(twins, train=train)
    rung = "gradients, training mode" if train else "gradients"
    rows = [compare_arrays(rung, "loss", np.asarray(ours.loss), theirs.loss.detach().numpy())]
    rows += _compared_gradients(rung, twins, ours.gradients, theirs.model, theirs.image)
    if train:
        rows += statistics_rows(theirs.model, ours.updated.get("batch_stats", {}), twins)
    return rows


class FlaxBackward(NamedTuple):
    """Loss, gradients by parameters and image, and updated collections of the Flax model."""

    loss: jax.Array
    gradients: Any
    updated: Any


class TorchBackward(NamedTuple):
    """Loss, logits, and PyTorch's model and image, which hold their gradients."""

    loss: torch.Tensor
    logits: torch.Tensor
    model: torch.nn.Module
    image: torch.Tensor


def backward(twins: Twins, *, train: bool) -> tuple[FlaxBackward, TorchBackward]:
    """Runs both models forward and backward.

    Args:
      twins: both models.
      train: whether both run in training mode.
    """
    labels = random_labels(twins)
    torch_model = copy.deepcopy(twins.torch_model).train(train)
    x = channels_first_tensor(twins.image).requires_grad_()
    logits = torch_model(x)
    logits.retain_grad()
    their_loss = torch_loss(logits, torch.from_numpy(labels).long())
    their_loss.backward()

    # As in the training application, equal blocks are traced once.
    model = twins.model.clone(jit_blocks=True)

    def loss_fn(params, image, labels):
        logits, updated = model.apply(
            {**twins.variables, "params": params},
            image,
            train=train,
            mutable=["batch_stats"] if train else [],
        )
        return dice_cross_entropy_loss(logits, labels), updated

    (our_loss, updated), gradients = _value_and_gradients(loss_fn, twins, labels)
    return (
        FlaxBackward(our_loss, gradients, updated),
        TorchBackward(their_loss, logits, torch_model, x),
    )


def backward_findings(twins: Twins, *, train: bool) -> list[Finding]:
    """Explains why the gradients of both models differ.

    The loss is judged first, then each module on PyTorch's gradients. If all of them hold alone,
    the gradients themselves are compared.
    """
    ours, theirs = backward(twins, train=train)
    labels = random_labels(twins)
    logits = theirs.logits.detach().numpy()
    value_and_grad = jax.value_and_grad(dice_cross_entropy_loss)
    our_loss, our_grad = value_and_grad(np.moveaxis(logits, 1, -1), labels)
    findings = explain_loss(
        logits,
        labels,
        (np.asarray(our_loss), channels_first(our_grad)),
        (theirs.loss.detach().numpy(), theirs.logits.grad.numpy()),
    )
    findings = findings or diagnose_backward(
        twins, lambda x: torch_loss(x, torch.from_numpy(labels).long()), train=train
    )
    if findings:
        return findings
    named = theirs.model.named_parameters()
    of_torch = {name: p.grad.numpy() for name, p in named if p.grad is not None}
    largest = max(float(np.abs(gradient).max()) for gradient in of_torch.values())
    of_flax = to_torch({"params": ours.gradients[0]}, twins.cfg)
    return explain_gradients(of_flax, of_torch, negligible=NEGLIGIBLE * largest)


def evaluation_rows(twins: Twins, *, seed: int = 1) -> list[Row]:
    """Compares all that `activation_rows` does, and gradients of a randomly weighted sum of logits.

    Both come from one program, so that a grid of configurations compiles one program for each.

    Args:
      twins: both models.
      seed: seed of the weights in the sum.
    """
    cfg = twins.cfg
    shape = (len(twins.image), *cfg.img_size, cfg.out_channels)
    weighting = np.random.default_rng(seed).standard_normal(shape).astype(twins.dtype)
    x = channels_first_tensor(twins.image).requires_grad_()
    (twins.torch_model(x) * channels_first_tensor(weighting)).mean().backward()

    def loss_fn(params, image, weighting):
        tree = forward(cfg, twins.model, {**twins.variables, "params": params}, image)
        return (tree["logits"] * weighting).mean(), tree

    (_, tree), gradients = _value_and_gradients(loss_fn, twins, weighting)
    rows = compared_rows(twins, flax_found(cfg, tree))
    rows += _compared_gradients("gradients", twins, gradients, twins.torch_model, x)
    twins.torch_model.zero_grad()
    return rows


def _value_and_gradients(loss_fn: Callable[..., Any], twins: Twins, target: np.ndarray) -> Any:
    """Runs `loss_fn(params, image, target)` and its gradients by `params` and `image`."""
    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    return run_once(value_and_grad, twins.variables["params"], twins.image, target)


def _compared_gradients(
    rung: str, twins: Twins, gradients: Any, torch_model: torch.nn.Module, x: torch.Tensor
) -> list[Row]:
    """Compares the gradients of the image and of all parameters; PyTorch's are in its tensors."""
    parameters, image = gradients
    rows = [compare_arrays(rung, "image", channels_first(image), x.grad.numpy())]
    # Parameters that PyTorch never applies have no gradient there, and do not exist in Flax.
    theirs = {
        name: p.grad.numpy() for name, p in torch_model.named_parameters() if p.grad is not None
    }
    ours = to_torch({"params": parameters}, twins.cfg)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    weights = canceled(torch_model, twins.cfg)
    for name, gradient in theirs.items():
        beside = (weights[name], theirs[weights[name]]) if name in weights else None
        rows.append(compare_arrays(rung, name, ours[name], gradient, beside=beside))
    return rows


def statistics_rows(torch_model: torch.nn.Module, batch_stats, twins: Twins) -> list[Row]:
    """Compares the running statistics of both models."""
    ours = to_torch({**twins.variables, "batch_stats": batch_stats}, twins.cfg)
    return [
        compare_arrays("running statistics", name, ours[name], value.numpy())
        for name, value in torch_model.state_dict().items()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]


def canceled(model: torch.nn.Module, cfg: UNETRConfig) -> dict[str, str]:
    """Finds parameters whose gradient is zero except for rounding, and a weight to judge each by.

    The rounding is of the size of that weight's gradient, which sums similar terms that do not
    cancel.

    Returns:
      The name of the weight by the name of the parameter.
    """
    found = {}
    for name, parameter in model.named_parameters():
        block, _, leaf = name.rpartition(".")
        if leaf == "bias" and block.endswith("attn.key"):
            # A softmax over keys cancels a term that is added to all of them.
            found[name] = f"{block}.weight"
        one_factor = name.endswith("conv3.conv.weight") and parameter[0].numel() == 1
        if one_factor and cfg.norm == "instance":
            # The norm cancels a factor that scales the only input channel.
            found[name] = name.replace("conv3", "conv1")
    if model.training:
        # Batch statistics cancel a bias in the convolution before the norm.
        found |= {f"{n}.bias": f"{n}.weight" for n in _before_batch_norm(model)}
    return found


def _before_batch_norm(model: torch.nn.Module) -> set[str]:
    """Finds the names of convolutions with biases that a batch norm directly follows."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Sequential):
            children = list(module.named_children())
            for (child, _), (_, following) in itertools.pairwise(children):
                if isinstance(following, torch.nn.BatchNorm3d):
                    names.add(f"{name}.{child}.block")
    return names
