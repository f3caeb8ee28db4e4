"""The training program of a run: the model, and the compiled step with what belongs to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train import sharding
from train.config import Config
from train.losses import Loss, make_loss
from train.optim import learning_rate_schedule, make_optimizer
from train.state import TrainState, abstract_state
from train.step import abstract_batch, make_train_step
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.runtime.aot import BackgroundProgram, compile_in_background


def make_model(cfg: Config, model_config: UNETRConfig) -> UNETR:
    """Makes the model of a run.

    Args:
      cfg: the options of the run.
      model_config: the model, with as many channels and classes as the data have.
    """
    return UNETR(
        model_config,
        dtype=jnp.dtype(cfg.model.dtype),
        jit_blocks=True,
        stochastic_depth=cfg.training.stochastic_depth,
    )


class Program(NamedTuple):
    """The training step of a run of some length, and what belongs to it."""

    tx: optax.GradientTransformation
    learning_rate: Callable[[int], Any]
    abstract: TrainState
    train_step: BackgroundProgram


def compile_program(
    cfg: Config, model: UNETR, mesh: jax.sharding.Mesh, total_steps: int
) -> Program:
    """Begins to compile the training step of a run of `total_steps` in the background."""
    training = cfg.training
    learning_rate = learning_rate_schedule(
        training.learning_rate, total_steps, training.warmup_fraction, training.schedule
    )
    tx = make_optimizer(
        learning_rate,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        layer_decay=training.layer_decay,
    )
    replicated = sharding.replicated(mesh)
    abstract = abstract_state(model, tx, replicated, averaged=training.ema_decay > 0)
    # Compiling takes about as long as making or reading a state, which goes on meanwhile.
    train_step = compile_in_background(
        make_train_step(
            model,
            tx,
            _loss(cfg),
            replicated,
            accumulate=training.accumulate,
            ema_decay=training.ema_decay,
        ),
        abstract,
        abstract_batch(model.config, cfg.data.batch_size, sharding.batch_sharding(mesh)),
    )
    return Program(tx, learning_rate, abstract, train_step)


def _loss(cfg: Config) -> Loss:
    options = cfg.loss
    return make_loss(
        options.loss,
        include_background=not options.exclude_background,
        squared_pred=options.squared_pred,
        batch=options.batch_dice,
        smooth_nr=options.smooth_nr,
        smooth_dr=options.smooth_dr,
        class_weights=options.class_weights,
    )
