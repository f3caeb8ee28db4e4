"""The ladder's rung of training: both models take the same optimizer steps."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity_tests.gradients import random_labels, statistics_rows
from parity_tests.torch_loss import dice_cross_entropy as torch_loss
from train.losses import dice_cross_entropy_loss
from train.optim import clip_by_global_norm
from train.state import TrainState, initial_state
from train.step import make_train_step
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.twins import Twins, channels_first_tensor
from unetr_flax.weights import to_torch

# Biases before a batch norm have a gradient of zero except for rounding. Adam divides a gradient by
# its size plus epsilon, so an epsilon of 1e-8 would turn rounding into steps of 1e-10.
ADAM_EPSILON = 1e-6
LEARNING_RATE = {"adamw": 1e-3, "sgd": 1e-2}
WEIGHT_DECAY = 0.05
MOMENTUM = 0.9
STEPS = 100

# Arrays by PyTorch's names.
Named = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Training:
    """How a trajectory's steps are taken.

    Attributes:
      optimizer: "adamw" (with weight decay) or "sgd" (with momentum).
      accumulate: parts of the batch whose gradients are averaged for a step.
      clip_norm: largest global norm of a gradient; None for any.
      ema_decay: decay of the average of the weights; None for no average.
    """

    optimizer: Literal["adamw", "sgd"]
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __str__(self) -> str:
        words = [self.optimizer]
        words += [f"{self.accumulate} parts accumulated"] * (self.accumulate > 1)
        words += ["clipped"] * (self.clip_norm is not None)
        words += ["averaged"] * (self.ema_decay is not None)
        return ", ".join(words)


# The first gradients of small models have norms of 0.5 to 3, so all steps are clipped.
TRAININGS = (
    Training("adamw", clip_norm=0.1, ema_decay=0.9),
    Training("sgd", accumulate=2),
)


def trajectory_rows(twins: Twins, training: Training, steps: int = STEPS) -> list[Row]:
    """Compares all losses, and parameters, running statistics and averages after the last step.

    Args:
      twins: both models.
      training: how steps are taken.
      steps: optimizer steps, all on the same batch, in training mode.
    """
    their_model, their_average, their_losses = _torch_steps(twins, training, steps)
    state, our_losses = _flax_steps(twins, training, steps)
    rung = f"{steps} steps of {training}"
    rows = [compare_arrays(rung, "loss of every step", our_losses, their_losses)]
    compared: list[tuple[str, torch.nn.Module, Any]] = [("", their_model, state.variables)]
    if their_average is not None:
        compared.append(("average: ", their_average, state.average))
    for prefix, model, variables in compared:
        ours = to_torch(variables, twins.cfg)
        found = [
            compare_arrays(rung, parameter, ours[parameter], value.detach().numpy())
            for parameter, value in model.named_parameters()
            # MONAI's models have parameters that they never apply.
            if parameter in ours
        ]
        found += statistics_rows(model, variables["batch_stats"], twins)
        rows += [dataclasses.replace(r, rung=rung, name=f"{prefix}{r.name}") for r in found]
    return rows


def first_steps(twins: Twins, training: Training) -> tuple[Named, Named, Named, Named]:
    """Takes one step with both models; returns the parameters by PyTorch's names.

    Returns:
      The parameters before the step, PyTorch's gradients, and the parameters after the Flax
      model's and after PyTorch's step.
    """
    before = {n: p.detach().numpy().copy() for n, p in twins.torch_model.named_parameters()}
    model, _, _ = _torch_steps(twins, training, 1)
    state, _ = _flax_steps(twins, training, 1)
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    theirs = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return before, gradients, to_torch(state.variables, twins.cfg), theirs


def _torch_steps(
    twins: Twins, training: Training, steps: int
) -> tuple[torch.nn.Module, torch.nn.Module | None, np.ndarray]:
    """Returns the model after the steps, its average if there is one, and all losses."""
    model = copy.deepcopy(twins.torch_model).train()
    lr = LEARNING_RATE[training.optimizer]
    if training.optimizer == "adamw":
        update: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY
        )
    else:
        update = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    average = None
    if training.ema_decay is not None:
        average_of = _torch_average(training.ema_decay)
        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=average_of, use_buffers=True)
        # The average of the application starts with the weights before the first step.
        average.n_averaged += 1
    x, labels = channels_first_tensor(twins.image), torch.from_numpy(random_labels(twins)).long()
    losses = []
    for _ in range(steps):
        update.zero_grad()
        total = 0.0
        for part in range(training.accumulate):
            rows = slice(part, None, training.accumulate)
            loss = torch_loss(model(x[rows]), labels[rows]) / training.accumulate
            loss.backward()
            total += loss.detach().numpy()
        if training.clip_norm is not None:
            _torch_clip(model, training.clip_norm)
        update.step()
        if average is not None:
            average.update_parameters(model)
        losses.append(total)
    return model, None if average is None else average.module, np.stack(losses)


def _torch_clip(model: torch.nn.Module, max_norm: float) -> None:
    """Clips gradients by their global norm.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm, which the definition does not.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient *= torch.clamp(max_norm / norm, max=1)


def _torch_average(decay: float) -> Callable[..., torch.Tensor]:
    """Returns the average's change after a step, with a decay that grows as in `train.ema`."""

    def update(average: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        # The application counts steps in float32.
        step = np.float32(count.item() - 1)
        share = 1 - np.minimum(np.float32(decay), (1 + step) / (10 + step))
        return average + (value - average) * float(share)

    return update


def _flax_steps(twins: Twins, training: Training, steps: int) -> tuple[TrainState, np.ndarray]:
    """Takes the steps with the training application's own step function."""
    lr = LEARNING_RATE[training.optimizer]
    if training.optimizer == "adamw":
        update = optax.adamw(lr, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY)
    else:
        update = optax.sgd(lr, momentum=MOMENTUM)
    if training.clip_norm is not None:
        update = optax.chain(clip_by_global_norm(training.clip_norm), update)
    variables: Any = jax.tree.map(jnp.asarray, twins.variables)
    averaged = training.ema_decay is not None
    state = initial_state(variables, update, jax.random.key(0), averaged=averaged)
    # As in the training application, equal blocks are traced once.
    step = make_train_step(
        twins.model.clone(jit_blocks=True),
        update,
        dice_cross_entropy_loss,
        accumulate=training.accumulate,
        ema_decay=training.ema_decay or 0.0,
    )
    # The steps of a small model take less time than compiling one as it is for long trainings.
    train_step = jit_to_run_once(step.__wrapped__)
    batch: Any = {"image": twins.image, "label": random_labels(twins)}
    losses = []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return state, np.stack(losses)
