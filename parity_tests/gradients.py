"""Rungs of one backward pass and of one training-mode call: gradients, running statistics."""

import copy
import itertools

import jax
import numpy as np
import torch

from parity_tests.compare import Row, compare
from parity_tests.torch_loss import dice_cross_entropy as torch_loss
from parity_tests.twins import Twins, channels_first, to_tensor
from train.losses import dice_cross_entropy_loss
from unetr_flax.weights import to_torch


def gradient_rows(twins: Twins, *, train: bool) -> list[Row]:
    """Loss, gradient of every parameter and of the image; in training mode, running statistics too.

    Args:
      twins: both models.
      train: whether normalisation uses the batch's statistics.
    """
    rung = "gradients, training mode" if train else "gradients"
    torch_model = copy.deepcopy(twins.torch_model).train(train)
    x = to_tensor(twins.image).requires_grad_()
    their_loss = torch_loss(torch_model(x), torch.from_numpy(twins.labels).long())
    their_loss.backward()

    def loss_fn(params, image):
        variables = {"params": params, "batch_stats": twins.variables["batch_stats"]}
        logits, updated = twins.model.apply(
            variables, image, train=train, mutable=["batch_stats"] if train else []
        )
        return dice_cross_entropy_loss(logits, twins.labels), updated

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (our_loss, updated), (grads, image_grad) = value_and_grad(
        twins.variables["params"], twins.image
    )

    rows = [compare(rung, "loss", np.asarray(our_loss), their_loss.detach().numpy())]
    rows.append(compare(rung, "image", channels_first(image_grad), x.grad.numpy()))
    theirs = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
    ours = to_torch({"params": grads}, twins.cfg)
    cancelled = _before_batch_norm(torch_model) if train else set()
    for name, gradient in theirs.items():
        scale = None
        if name in cancelled:
            # Batch statistics cancel this bias: its gradient is zero but for rounding, and the
            # rounding is that of the weight's gradient beside it.
            scale = float(np.abs(theirs[name.removesuffix("bias") + "weight"]).max())
        rows.append(compare(rung, name, ours[name], gradient, scale=scale))
    if train:
        rows += statistics_rows(torch_model, updated["batch_stats"], twins)
    return rows


def statistics_rows(torch_model: torch.nn.Module, batch_stats, twins: Twins) -> list[Row]:
    """Running statistics of both models."""
    variables = {"params": twins.variables["params"], "batch_stats": batch_stats}
    ours = to_torch(variables, twins.cfg)
    return [
        compare("running statistics", name, ours[name], value.numpy())
        for name, value in torch_model.state_dict().items()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    ]


def _before_batch_norm(model: torch.nn.Module) -> set[str]:
    """Names of the biases that a batch normalisation directly after them cancels."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Sequential):
            children = list(module.named_children())
            for (child, _), (_, following) in itertools.pairwise(children):
                if isinstance(following, torch.nn.BatchNorm3d):
                    names.add(f"{name}.{child}.block.bias")
    return names
