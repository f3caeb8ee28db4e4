"""One run from its options to its results: prepare the task, train, show the results."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack

import jax
from jax.sharding import Mesh

from train import distributed, sharding
from train.checkpoint import Checkpoints
from train.config import Config
from train.console import make_console
from train.data.augment import AUGMENTATIONS
from train.data.loader import Batches
from train.export import save_model
from train.initial import check_initial, with_initial_weights
from train.interrupt import Interrupt
from train.log import RunLog
from train.loop import Progress, Schedule, fit
from train.measure import schedule_of_budget
from train.memory import check_size, check_step, device_memory
from train.plan import plan_options
from train.program import compile_program, compile_program_of_any_length, make_changes, make_model
from train.results import show_results
from train.run_dir import (
    OptionError,
    checkpoints_folder,
    claimed,
    resume_command,
    run_file,
    write_plan,
    write_run_file,
)
from train.sheet import draw_samples, save_sheet
from train.state import create_state
from train.task import Task, prepare
from train.validate import Evaluator
from unetr_flax.inference.predictor import make_predict
from unetr_flax.runtime.cudnn import refuse_wrong_convolutions


def run(cfg: Config, args: list[str], started: float | None = None) -> int:
    """Plans what is not given, trains, and shows the results unless interrupted.

    Args:
      cfg: the options.
      args: the command line that they come from.
      started: when the time of --budget began, on the monotonic clock; now if None.

    Returns:
      The exit status: 0 if the end was reached, that of `train.interrupt.exit_status` if a signal
      stopped the run.

    Raises:
      OptionError: if options do not fit the data, the devices or the folder.
      unetr_flax.runtime.cudnn.CudnnError: if this machine's cuDNN computes wrongly in --dtype.
      train.data.dataset.BadCasesError: if files of the data cannot be trained on.
      train.data.dataset.DataError: if the data set as a whole cannot be read.
      train.loop.DivergenceError: if loss or gradient were not finite for too long.
      train.checkpoint.CheckpointError: if checkpoints cannot be written or read.
      train.interrupt.Stopped: if a signal comes before the first step.
    """
    if started is None:
        started = time.monotonic()
    refuse_wrong_convolutions(cfg.model.dtype)
    check_initial(cfg)
    mesh = _mesh(cfg)
    # Again when they are planned: what is absurd needs neither the data nor the folder.
    check_size(cfg, mesh)
    with ExitStack() as stack:
        distributed.run_on_main(lambda: stack.enter_context(claimed(cfg)))
        cfg, plan = plan_options(args, cfg)
        _check_fits(mesh, cfg, cfg.data.roi_size)
        check_size(cfg, mesh)
        task = prepare(cfg, make_console(quiet=not distributed.is_main()))
        _check_fits(mesh, cfg, task.model_config.img_size)
        distributed.run_on_main(
            lambda: write_run_file(cfg, task.dataset, task.val_cases, task.model_config, plan)
        )
        return _train(cfg, task, mesh, plan, started)


def _mesh(cfg: Config) -> Mesh:
    try:
        return sharding.make_mesh(cfg.run.fsdp, cfg.run.depth_shards)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _check_fits(mesh: Mesh, cfg: Config, img_size: tuple[int, ...] | None) -> None:
    grid_depth = None if img_size is None else img_size[0] // cfg.model.patch_size[0]
    try:
        sharding.check_fits(mesh, cfg.data.batch_size, cfg.training.accumulate, grid_depth)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _train(cfg: Config, task: Task, mesh: Mesh, plan: Sequence[str], started: float) -> int:
    training = cfg.training
    console = make_console(quiet=not distributed.is_main())
    if plan:
        console.print("The plan for these data:", *plan, sep="\n  ", soft_wrap=True)
    model = make_model(cfg, task.model_config)
    averaged = training.ema_decay > 0
    evaluator = Evaluator(
        make_predict(model),
        task.model_config,
        task.dataset,
        task.val_cases,
        task.preprocessing,
        training.overlap,
        # Windows that devices share in training are large for the one that segments them.
        windows=1 if cfg.run.depth_shards > 1 else None,
    )
    batches = Batches(
        task.train_samples,
        AUGMENTATIONS[cfg.augmentation.augmentation].crop(task.model_config.img_size),
        cfg.data.batch_size,
        training.seed,
        shard=sharding.batch_share(mesh),
    )
    steps_per_epoch = cfg.steps_per_epoch(len(task.train_samples))
    schedule = Schedule.of_epochs(steps_per_epoch, training.epochs, training.eval_every)
    has_regions = task.dataset.has_regions
    # Now, since later the state, which is made meanwhile, would take a part of it.
    memory = device_memory()

    def check(step: jax.stages.Compiled) -> None:
        console.print(check_step(step, memory), soft_wrap=True)

    if training.budget is None:
        program = compile_program(cfg, model, mesh, has_regions, schedule.total_steps, check)
    else:
        of_length = compile_program_of_any_length(cfg, model, mesh, has_regions, check)
        program = of_length(schedule.total_steps)
        schedule = schedule_of_budget(
            cfg, task, model, mesh, program, schedule, evaluator, batches, started, console
        )
        program = of_length(schedule.total_steps)
    abstract, tx = program.abstract, program.tx
    checkpoints = Checkpoints(checkpoints_folder(cfg.out), cfg.run.keep_checkpoints)
    try:
        progress, samples = Progress(), None
        if checkpoints.last_step is None:
            placed = sharding.state_sharding(abstract, mesh)
            state = create_state(model, tx, training.seed, placed, averaged=averaged)
            state, loaded = with_initial_weights(state, cfg, task.model_config)
            if loaded:
                console.print(loaded, soft_wrap=True)
            if distributed.is_main():
                samples = draw_samples(batches, make_changes(cfg), training.seed)
        else:
            state, resume_state = checkpoints.restore_last(abstract)
            batches.restore(resume_state["batches"])
            progress = Progress(**resume_state["progress"])
        checkpoints.forget_best_after(int(state.step))
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
        # Until the step is compiled and checked, the run may be refused; nothing is written before.
        program.wait()
        if samples is not None:
            save_sheet(cfg.out / "augmentation.png", *samples)
            write_plan(cfg.out)
        log = RunLog(
            cfg.out if distributed.is_main() else None,
            task.dataset.labels,
            schedule.total_steps,
            schedule.steps_per_epoch,
            int(state.step),
            progress.validated_step,
        )
        with log, Interrupt() as interrupt:
            done = fit(
                state,
                progress,
                schedule=schedule,
                batches=batches,
                train_step=program.train_step,
                shard_batch=lambda batch: sharding.shard_batch(batch, mesh),
                evaluate=lambda state: evaluator(state, interrupt),
                learning_rate=program.learning_rate,
                checkpoints=checkpoints,
                log=log,
                interrupt=interrupt,
                save_seconds=60 * cfg.run.save_minutes,
            )
        if done:
            best = checkpoints.restore_best(abstract.variables, progress.best_step)
            variables = sharding.local_copy(best)
            if distributed.is_main():
                record = json.loads(run_file(cfg.out).read_text(encoding="utf-8"))
                save_model(cfg.out / "model", variables, record, progress.best_step)
                show_results(cfg.out, console, task, evaluator, variables, progress)
        else:
            console.print(f"Saved at step {checkpoints.last_step}. To go on:")
            console.print(resume_command(cfg), soft_wrap=True)
        return 0 if done else interrupt.exit_status
    finally:
        batches.close()
        checkpoints.close()
