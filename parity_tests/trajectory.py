"""The ladder's rung of training: both models take the same optimizer steps."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
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
from train.state import initial_state
from train.step import make_train_step
from unetr_flax import UNETRConfig
from unetr_flax.parity.diagnose import Finding
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.training import explain_average, explain_step
from unetr_flax.parity.twins import Twins, channels_first_tensor
from unetr_flax.weights import to_torch

# Biases before a batch norm have a gradient of zero except for rounding. Adam divides a gradient by
# its size plus epsilon, so an epsilon of 1e-8 would turn rounding into steps of 1e-10.
ADAM_EPSILON = 1e-6
LEARNING_RATE = {"adamw": 1e-3, "sgd": 1e-2}
# Steps in which the learning rate rises.
WARMUP = 10
WEIGHT_DECAY = 0.05
MOMENTUM = 0.9
STEPS = 100
# Names of the optimizers' averages in optax and in PyTorch, by those in the definition of a step.
MOMENTS = {
    "adamw": {"first": ("mu", "exp_avg"), "second": ("nu", "exp_avg_sq")},
    "sgd": {"velocity": ("trace", "momentum_buffer")},
}

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
    losses = []
    for theirs, ours in _both(twins, training, steps):
        losses.append((ours.loss, theirs.loss))
    rung = name_of_rung(training, steps)
    rows = [compare_arrays(rung, "loss of every step", *map(np.stack, zip(*losses, strict=True)))]
    compared: list[tuple[str, torch.nn.Module, Any]] = [("", theirs.model, ours.variables)]
    if theirs.average is not None:
        compared.append(("average: ", theirs.average, ours.average))
    for prefix, model, variables in compared:
        converted = to_torch(variables, twins.cfg)
        found = [
            compare_arrays(rung, parameter, converted[parameter], value.detach().numpy())
            for parameter, value in model.named_parameters()
            # MONAI's models have parameters that they never apply.
            if parameter in converted
        ]
        found += statistics_rows(model, variables["batch_stats"], twins)
        rows += [dataclasses.replace(r, rung=rung, name=f"{prefix}{r.name}") for r in found]
    return rows


def name_of_rung(training: Training, steps: int = STEPS) -> str:
    """Returns the rung of a trajectory's rows."""
    return f"{steps} steps of {training}"


def trajectory_findings(twins: Twins, training: Training, steps: int = STEPS) -> list[Finding]:
    """Explains the first optimizer step that parts, or the first change of the averages."""
    before = ours_before = average = our_average = _named_parameters(twins.torch_model)
    moments: Any = ({}, {})
    for count, (theirs, ours) in enumerate(_both(twins, training, steps)):
        after, ours_after = _named_parameters(theirs.model), to_torch(ours.variables, twins.cfg)
        right = {"learning_rates": learning_rates(training, steps), "count": count}
        gradients = {name: g.numpy() for name, g in theirs.gradients.items()}
        largest = max(float(np.abs(gradient).max()) for gradient in gradients.values())
        # Gradients that are zero except for rounding make steps that nothing explains.
        clear = {n: g for n, g in gradients.items() if np.abs(g).min() > 1e-9 * largest}
        findings = explain_step(
            "adam" if training.optimizer == "adamw" else "sgd",
            before,
            clear,
            _moved(before, ours_before, ours_after, clear),
            after,
            right={**right, **_right(training)},
            moments=moments,
            norm=float(theirs.norm),
        )
        if not findings and theirs.average is not None:
            average_after = _named_parameters(theirs.average)
            our_average_after = to_torch(ours.average, twins.cfg)
            findings = explain_average(
                {name: average[name] for name in clear},
                after,
                _moved(average, our_average, our_average_after, clear),
                average_after,
                right={"decay": training.ema_decay, "count": count},
            )
            average, our_average = average_after, our_average_after
        if findings:
            return findings
        before, ours_before = after, ours_after
        optimizer = training.optimizer
        moments = ours.moments(optimizer, twins.cfg), theirs.moments(optimizer)
    return []


def _moved(start: Named, before: Named, after: Named, names: Iterable[str]) -> Named:
    """Adds the change of a step to another start, so that rounding before it does not count."""
    return {name: start[name] + (after[name] - before[name]) for name in names}


def _both(twins: Twins, training: Training, steps: int) -> Iterator[tuple["TorchStep", "FlaxStep"]]:
    """Takes the steps with both models."""
    both = _torch_steps(twins, training, steps), _flax_steps(twins, training, steps)
    return zip(*both, strict=True)


def learning_rates(training: Training, steps: int) -> list[float]:
    """Returns the rate of each step: a linear warm-up, then the highest one."""
    return [LEARNING_RATE[training.optimizer] * _warmth(step) for step in range(steps)]


def _warmth(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP)


def _right(training: Training) -> dict[str, Any]:
    """Returns the settings that both optimizers should have."""
    clip = {} if training.clip_norm is None else {"clip": training.clip_norm}
    if training.optimizer == "adamw":
        return {"epsilon": ADAM_EPSILON, "weight_decay": WEIGHT_DECAY, **clip}
    return {"momentum": MOMENTUM, **clip}


def _named_parameters(model: torch.nn.Module) -> Named:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """What one step of PyTorch's left behind.

    Attributes:
      model: the model after the step; the next step changes it.
      average: its average, None if there is none; the next step changes it.
      loss: the loss before the step.
      gradients: the gradients of the parameters that have one, before they are clipped.
      norm: their global norm, by which they are clipped.
      update: the optimizer, with its averages after the step; the next step changes it.
    """

    model: torch.nn.Module
    average: torch.nn.Module | None
    loss: np.ndarray
    gradients: dict[str, torch.Tensor]
    norm: torch.Tensor
    update: torch.optim.Optimizer

    def moments(self, optimizer: str) -> dict[str, Named]:
        """Copies the averages of the optimizer, by kind and parameter."""
        state = {n: self.update.state[p] for n, p in self.model.named_parameters()}
        return {
            kind: {name: state[name][key].numpy().copy() for name in self.gradients}
            for kind, (_, key) in MOMENTS[optimizer].items()
        }


def _torch_steps(twins: Twins, training: Training, steps: int) -> Iterator[TorchStep]:
    """Takes the steps with PyTorch's optimizers, schedules and averages."""
    model = copy.deepcopy(twins.torch_model).train()
    lr = LEARNING_RATE[training.optimizer]
    if training.optimizer == "adamw":
        update: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY
        )
    else:
        update = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(update, _warmth)
    average = None
    if training.ema_decay is not None:
        average_of = _torch_average(training.ema_decay)
        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=average_of, use_buffers=True)
        # The average of the application starts with the weights before the first step.
        average.n_averaged += 1
    x, labels = channels_first_tensor(twins.image), torch.from_numpy(random_labels(twins)).long()
    for _ in range(steps):
        update.zero_grad()
        total = 0.0
        for part in range(training.accumulate):
            rows = slice(part, None, training.accumulate)
            loss = torch_loss(model(x[rows]), labels[rows]) / training.accumulate
            loss.backward()
            total += loss.detach().numpy()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        if training.clip_norm is not None:
            _torch_clip(model, norm, training.clip_norm)
        update.step()
        schedule.step()
        if average is not None:
            average.update_parameters(model)
        averaged = None if average is None else average.module
        yield TorchStep(model, averaged, np.asarray(total), gradients, norm, update)


def _torch_clip(model: torch.nn.Module, norm: torch.Tensor, max_norm: float) -> None:
    """Puts gradients clipped by their global norm in the places of those that are not.

    `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the norm, which the definition does not.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * torch.clamp(max_norm / norm, max=1)


def _torch_average(decay: float) -> Callable[..., torch.Tensor]:
    """Returns the average's change after a step, with a decay that grows as in `train.ema`."""

    def update(average: torch.Tensor, value: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        # The application counts steps in float32.
        step = np.float32(count.item() - 1)
        share = 1 - np.minimum(np.float32(decay), (1 + step) / (10 + step))
        return average + (value - average) * float(share)

    return update


@dataclasses.dataclass(frozen=True)
class FlaxStep:
    """What one step of the application's left behind.

    Attributes:
      variables: the variables after the step.
      average: their average, None if there is none.
      loss: the loss before the step.
      opt_state: the optimizer's state after the step.
    """

    variables: Any
    average: Any
    loss: np.ndarray
    opt_state: Any

    def moments(self, optimizer: str, cfg: UNETRConfig) -> dict[str, Named]:
        """Returns the averages of the optimizer, by kind and PyTorch's name of the parameter."""
        return {
            kind: to_torch({"params": optax.tree_utils.tree_get(self.opt_state, key)}, cfg)
            for kind, (key, _) in MOMENTS[optimizer].items()
        }


def _flax_steps(twins: Twins, training: Training, steps: int) -> Iterator[FlaxStep]:
    """Takes the steps with the training application's own step function."""
    rates = jnp.asarray(learning_rates(training, steps), twins.dtype)

    def rate(count: Any) -> jax.Array:
        return rates[count]

    if training.optimizer == "adamw":
        update = optax.adamw(rate, eps=ADAM_EPSILON, weight_decay=WEIGHT_DECAY)
    else:
        update = optax.sgd(rate, momentum=MOMENTUM)
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
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        loss = np.asarray(metrics["loss"])
        yield FlaxStep(state.variables, state.average, loss, state.opt_state)
