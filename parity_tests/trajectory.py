"""The ladder's rung of training: both models take the same optimizer steps."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity_tests.gradients import random_labels, statistics_rows
from parity_tests.torch_loss import dice_cross_entropy as torch_loss
from train.losses import dice_cross_entropy_loss
from train.state import initial_state
from train.step import make_train_step
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.twins import Twins, channels_first_tensor
from unetr_flax.weights import to_torch

# Biases before a batch norm have a gradient of zero except for rounding. Adam divides a gradient by
# its size plus epsilon, so an epsilon of 1e-8 would turn rounding into steps of 1e-10.
ADAM_EPSILON = 1e-6
LEARNING_RATE = {"adamw": 1e-3, "sgd": 1e-2}
WEIGHT_DECAY = 0.05
MOMENTUM = 0.9

# Arrays by PyTorch's names.
Named = dict[str, np.ndarray]


def trajectory_rows(twins: Twins, optimizer: str, steps: int = 20) -> list[Row]:
    """Compares the losses of all steps, and parameters and running statistics after the last.

    Args:
      twins: both models.
      optimizer: "adamw" (with weight decay) or "sgd" (with momentum).
      steps: optimizer steps, all on the same batch, in training mode.
    """
    their_model, their_losses = _torch_steps(twins, optimizer, steps)
    variables, our_losses = _flax_steps(twins, optimizer, steps)
    rung = f"{steps} steps of {optimizer}"
    rows = [compare_arrays(rung, "loss of every step", our_losses, their_losses)]
    ours = to_torch(variables, twins.cfg)
    rows += [
        compare_arrays(rung, name, ours[name], parameter.detach().numpy())
        for name, parameter in their_model.named_parameters()
    ]
    return rows + statistics_rows(their_model, variables["batch_stats"], twins)


def first_steps(twins: Twins, optimizer: str) -> tuple[Named, Named, Named, Named]:
    """Takes one step with both models; returns the parameters by PyTorch's names.

    Returns:
      The parameters before the step, PyTorch's gradients, and the parameters after the Flax
      model's and after PyTorch's step.
    """
    before = {n: p.detach().numpy().copy() for n, p in twins.torch_model.named_parameters()}
    model, _ = _torch_steps(twins, optimizer, 1)
    variables, _ = _flax_steps(twins, optimizer, 1)
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    theirs = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return before, gradients, to_torch(variables, twins.cfg), theirs


def _torch_steps(twins: Twins, optimizer: str, steps: int) -> tuple[torch.nn.Module, np.ndarray]:
    model = copy.deepcopy(twins.torch_model).train()
    lr = LEARNING_RATE[optimizer]
    if optimizer == "adamw":
        update = torch.optim.AdamW(
            model.parameters(), lr=lr, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY
        )
    else:
        update = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    x, labels = channels_first_tensor(twins.image), torch.from_numpy(random_labels(twins)).long()
    losses = []
    for _ in range(steps):
        update.zero_grad()
        loss = torch_loss(model(x), labels)
        loss.backward()
        update.step()
        losses.append(loss.detach().numpy())
    return model, np.stack(losses)


def _flax_steps(twins: Twins, optimizer: str, steps: int) -> tuple[dict[str, Any], np.ndarray]:
    """Takes the steps with the training application's own step function."""
    lr = LEARNING_RATE[optimizer]
    if optimizer == "adamw":
        update = optax.adamw(lr, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY)
    else:
        update = optax.sgd(lr, momentum=MOMENTUM)
    variables = jax.tree.map(jnp.asarray, twins.variables)
    state = initial_state(variables, update, jax.random.key(0))
    # As in the training application, equal blocks are traced once.
    model = twins.model.clone(jit_blocks=True)
    train_step = make_train_step(model, update, dice_cross_entropy_loss)
    batch = {"image": twins.image, "label": random_labels(twins)}
    losses = []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return state.variables, np.stack(losses)
