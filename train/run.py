"""One run from its options to its results: prepare the task, train, show the results."""

import json
from contextlib import ExitStack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from train import distributed, sharding
from train.checkpoint import Checkpoints
from train.config import Config
from train.console import make_console
from train.data.loader import Batches
from train.data.transforms import AUGMENTATIONS
from train.export import save_model
from train.interrupt import Interrupt
from train.log import RunLog
from train.loop import Progress, Schedule, fit
from train.losses import Loss, make_loss
from train.optim import learning_rate_schedule, make_optimizer
from train.results import show_results
from train.run_dir import OptionError, claimed, resume_command, run_file, write_run_file
from train.state import abstract_state, create_state
from train.step import abstract_batch, make_train_step
from train.task import Task, prepare
from train.validate import Evaluator
from unetr_flax import UNETR
from unetr_flax.runtime.aot import compile_in_background
from unetr_flax.runtime.cudnn import refuse_wrong_convolutions


def run(cfg: Config) -> bool:
    """Trains, and shows the results unless interrupted.

    Returns:
      Whether the end was reached.

    Raises:
      OptionError: if options do not fit the data, the devices or the folder.
      unetr_flax.runtime.cudnn.CudnnError: if this machine's cuDNN computes wrongly in --dtype.
      train.data.dataset.BadCasesError: if files of the data cannot be trained on.
      train.data.dataset.DataError: if the data set as a whole cannot be read.
      train.loop.DivergenceError: if the loss is no longer a number.
    """
    refuse_wrong_convolutions(cfg.model.dtype)
    mesh = _mesh(cfg)
    with ExitStack() as stack:
        distributed.run_on_main(lambda: stack.enter_context(claimed(cfg)))
        task = prepare(cfg, make_console(quiet=not distributed.is_main()))
        _check_fits(mesh, cfg, task.model_config.img_size)
        distributed.run_on_main(
            lambda: write_run_file(cfg, task.dataset, task.val_cases, task.model_config)
        )
        return _train(cfg, task, mesh)


def _mesh(cfg: Config) -> Mesh:
    try:
        mesh = sharding.make_mesh(cfg.run.fsdp, cfg.run.depth_shards)
    except ValueError as error:
        raise OptionError(str(error)) from None
    _check_fits(mesh, cfg, cfg.data.roi_size)
    return mesh


def _check_fits(mesh: Mesh, cfg: Config, img_size: tuple[int, ...] | None) -> None:
    grid_depth = None if img_size is None else img_size[0] // cfg.model.patch_size[0]
    try:
        sharding.check_fits(mesh, cfg.data.batch_size, cfg.training.accumulate, grid_depth)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _train(cfg: Config, task: Task, mesh: Mesh) -> bool:
    training = cfg.training
    console = make_console(quiet=not distributed.is_main())
    schedule = Schedule(
        cfg.steps_per_epoch(len(task.train_samples)), training.epochs, training.eval_every
    )
    learning_rate = learning_rate_schedule(
        training.learning_rate, schedule.total_steps, training.warmup_fraction, training.schedule
    )
    tx = make_optimizer(
        learning_rate,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        layer_decay=training.layer_decay,
    )
    model = UNETR(
        task.model_config,
        dtype=jnp.dtype(cfg.model.dtype),
        jit_blocks=True,
        stochastic_depth=training.stochastic_depth,
    )
    replicated = sharding.replicated(mesh)
    averaged = training.ema_decay > 0
    abstract = abstract_state(model, tx, replicated, averaged=averaged)
    abstract = sharding.with_sharding(abstract, mesh)
    placed = sharding.state_sharding(abstract, mesh)
    # Compiling takes about as long as making or reading a state, which goes on meanwhile.
    train_step = compile_in_background(
        make_train_step(
            model,
            tx,
            _loss(cfg),
            (placed, replicated),
            mesh=mesh,
            accumulate=training.accumulate,
            ema_decay=training.ema_decay,
        ),
        abstract,
        abstract_batch(task.model_config, cfg.data.batch_size, sharding.batch_sharding(mesh)),
    )
    evaluator = Evaluator(model, task.dataset, task.val_cases, task.preprocessing, training.overlap)
    batches = Batches(
        task.train_samples,
        AUGMENTATIONS[training.augmentation](task.model_config.img_size),
        cfg.data.batch_size,
        training.seed,
        shard=sharding.batch_share(mesh),
    )
    checkpoints = Checkpoints(cfg.out / "checkpoints")
    try:
        progress = Progress()
        if checkpoints.last_step is None:
            state = create_state(model, tx, training.seed, placed, averaged=averaged)
        else:
            state, resume_state = checkpoints.restore_last(abstract)
            batches.restore(resume_state["batches"])
            progress = Progress(**resume_state["progress"])
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        console.print(
            f"{task.dataset.name}: {len(task.train_samples)} cases to train on, "
            f"{len(task.val_cases)} to validate\n"
            f"UNETR with {parameters:,} parameters on {sharding.described(mesh)}, "
            f"{cfg.model.dtype}\n"
            f"{schedule.total_steps} steps in {schedule.epochs} epochs; {cfg.out} starts at step "
            f"{int(state.step)}; Ctrl-C saves and stops",
            soft_wrap=True,
        )
        log = RunLog(
            cfg.out if distributed.is_main() else None,
            task.dataset.labels,
            schedule.epochs,
            schedule.steps_per_epoch,
            int(state.step),
        )
        with log, Interrupt() as interrupt:
            done = fit(
                state,
                progress,
                schedule=schedule,
                batches=batches,
                train_step=train_step,
                shard_batch=lambda batch: sharding.shard_batch(batch, mesh),
                evaluate=lambda state: evaluator(state, interrupt),
                learning_rate=learning_rate,
                checkpoints=checkpoints,
                log=log,
                interrupt=interrupt,
            )
        if done:
            variables = sharding.local_copy(checkpoints.restore_best(abstract.variables))
            if distributed.is_main():
                record = json.loads(run_file(cfg.out).read_text(encoding="utf-8"))
                save_model(cfg.out / "model", variables, record, progress.best_step)
                show_results(cfg.out, console, task, evaluator, variables, progress)
        else:
            console.print(f"Saved at step {checkpoints.last_step}. To go on:")
            console.print(resume_command(cfg), soft_wrap=True)
        return done
    finally:
        batches.close()
        checkpoints.close()


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
