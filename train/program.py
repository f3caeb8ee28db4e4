"""The training program of a run: the model, and the compiled step with what belongs to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import sharding
from train.config import Config
from train.data.augment import AUGMENTATIONS, make_augment
from train.losses import Loss, make_target_loss
from train.optim import learning_rate_schedule, make_optimizer
from train.state import TrainState, abstract_state
from train.step import Augment, abstract_batch, make_train_step
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.runtime.aot import compile_in_background
from unetr_flax.runtime.compiler_options import compiler_options

# A schedule of any length is the schedule of so many steps, stretched or compressed.
STANDARD_STEPS = 10_000

Check = Callable[[jax.stages.Compiled], None]


def make_model(cfg: Config, model_config: UNETRConfig) -> UNETR:
    """Makes the model of a run.

    Args:
      cfg: the options of the run.
      model_config: the model, with as many channels and classes as the data have.
    """
    return UNETR(
        model_config,
        dtype=jnp.dtype(cfg.model.dtype),
        remat=cfg.training.remat,
        jit_blocks=True,
        stochastic_depth=cfg.training.stochastic_depth,
    )


def make_changes(cfg: Config) -> Augment | None:
    """Makes what happens to crops on the device; None if nothing does."""
    options = cfg.augmentation
    return make_augment(
        AUGMENTATIONS[options.augmentation].changes,
        flips=options.flips,
        flip_probability=options.flip_probability,
        rotate90_probability=options.rotate90_probability,
    )


class Program(NamedTuple):
    """The training step of a run of some length, and what belongs to it.

    Attributes:
      tx: the optimizer.
      learning_rate: the learning rate as a function of the step.
      abstract: shapes, dtypes and shardings of the train state.
      train_step: see `train.step.make_train_step`.
      wait: waits until the step is compiled.
    """

    tx: optax.GradientTransformation
    learning_rate: Callable[[int], Any]
    abstract: TrainState
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    wait: Callable[[], Any]


def compile_program(
    cfg: Config,
    model: UNETR,
    mesh: jax.sharding.Mesh,
    has_regions: bool,
    total_steps: int,
    check: Check,
) -> Program:
    """Begins to compile the training step of a run of `total_steps` in the background.

    Args:
      cfg: the options of the run.
      model: its model.
      mesh: the devices.
      has_regions: whether the data have regions, not classes.
      total_steps: number of steps of the whole run.
      check: called with the compiled step before its first call.
    """
    learning_rate = _schedule(cfg, total_steps)
    tx, abstract, batch, step = _parts(cfg, model, mesh, has_regions, learning_rate)
    # Compiling takes about as long as making or reading a state, which goes on meanwhile.
    program = compile_in_background(step, abstract, batch, check=check)
    return Program(tx, learning_rate, abstract, program, program.wait)


def compile_program_of_any_length(
    cfg: Config, model: UNETR, mesh: jax.sharding.Mesh, has_regions: bool, check: Check
) -> Callable[[int], Program]:
    """Begins to compile a training step whose number of steps is chosen later, by an argument.

    Arguments are those of `compile_program`.

    Returns:
      A function of the number of steps that returns the program of that length; nothing is compiled
      again.
    """
    replicated = sharding.replicated(mesh)
    # While the step is traced, holds the argument that stands for the number of steps.
    traced: list[jax.Array] = []
    standard = _schedule(cfg, STANDARD_STEPS)

    def learning_rate(count: Any, total_steps: Any) -> Any:
        # As in a schedule of its own length, the rate would be 0 one step after the last.
        share = jnp.asarray(count + 1, jnp.float32) / (total_steps + 1)
        return standard(share * STANDARD_STEPS - 1)

    tx, abstract, batch, step = _parts(
        cfg, model, mesh, has_regions, lambda count: learning_rate(count, traced[-1])
    )

    def train_step(state: TrainState, batch: Any, total_steps: jax.Array) -> Any:
        traced.append(total_steps)
        try:
            return step.__wrapped__(state, batch)
        finally:
            traced.pop()

    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(sharding.state_sharding(abstract, mesh), replicated),
        compiler_options=compiler_options(),
    )
    length = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    program = compile_in_background(jitted, abstract, batch, length, check=check)

    def of_length(total_steps: int) -> Program:
        number = jax.device_put(np.float32(total_steps), replicated)
        return Program(
            tx,
            lambda count: learning_rate(count, total_steps),
            abstract,
            lambda state, batch: program(state, batch, number),
            program.wait,
        )

    return of_length


def _schedule(cfg: Config, total_steps: int) -> optax.Schedule:
    training = cfg.training
    return learning_rate_schedule(
        training.learning_rate, total_steps, training.warmup_fraction, training.schedule
    )


def _parts(
    cfg: Config,
    model: UNETR,
    mesh: jax.sharding.Mesh,
    has_regions: bool,
    learning_rate: Callable[[Any], Any],
) -> tuple[optax.GradientTransformation, TrainState, Any, Any]:
    """Makes the optimizer, the shapes of state and batch, and the jitted step."""
    training = cfg.training
    tx = make_optimizer(
        learning_rate,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        layer_decay=training.layer_decay,
        b2=training.b2,
        optimizer=training.optimizer,
    )
    replicated = sharding.replicated(mesh)
    abstract = abstract_state(model, tx, replicated, averaged=training.ema_decay > 0)
    abstract = sharding.with_sharding(abstract, mesh)
    batch = abstract_batch(model.config, cfg.data.batch_size, sharding.batch_sharding(mesh))
    step = make_train_step(
        model,
        tx,
        _loss(cfg, has_regions),
        (sharding.state_sharding(abstract, mesh), replicated),
        mesh=mesh,
        augment=make_changes(cfg),
        accumulate=training.accumulate,
        ema_decay=training.ema_decay,
    )
    return tx, abstract, batch, step


def _loss(cfg: Config, has_regions: bool) -> Loss:
    options = cfg.loss
    return make_target_loss(
        options.loss,
        has_regions=has_regions,
        include_background=not options.exclude_background,
        squared_pred=options.squared_pred,
        batch=options.batch_dice,
        smooth_nr=options.smooth_nr,
        smooth_dr=options.smooth_dr,
        class_weights=options.class_weights,
    )
