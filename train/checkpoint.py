"""Checkpoints of a run: the last few, from which it is resumed, and the best, which is its result.

A run's folder holds
  run.json            how the run was started
  checkpoints/last/   train state and resume state (place in the data, progress of the loop)
  checkpoints/best/   parameters and running statistics with the best mean foreground Dice
Orbax writes each checkpoint to a temporary folder and renames it, so a checkpoint that exists is
complete.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.distributed import any_process, is_main
from train.state import TrainState
from unetr_flax.runtime.atomic import write_text
from unetr_flax.runtime.malloc import return_freed_memory
from unetr_flax.runtime.memory import is_out_of_files, is_out_of_memory

# Name of the resume state within a checkpoint.
RESUME = "progress"
# The file in which orbax keeps it.
RESUME_FILE = "metadata"
# Bytes of a state beyond which it is not copied to be saved in the background, on CPU.
LARGEST_COPY = 2**28
# A reason that the operating system gives, within the messages of orbax and tensorstore.
REASONS = re.compile(
    "No space left on device|File too large|Disk quota exceeded|Read-only file system|"
    "Permission denied|Input/output error|Stale file handle|No such file or directory|"
    "Too many open files"
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one line."""


class Checkpoints:
    """The checkpoints of one run; every process of the run must make the same calls.

    Args:
      folder: holds all; made if absent.
      keep: number of last checkpoints to keep.
      read_only: changes nothing, since another process may be saving there; no folder is made.

    Raises:
      CheckpointError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, keep: int = 1, *, read_only: bool = False):
        self._folder = folder.absolute()
        self._read_only = read_only
        # Orbax and its futures log pages of tracebacks for an error that is raised here, too.
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        _ignore_closed_loops()
        self._unfinished: list[ocp.CheckpointManager] = []
        self._last = self._manager("last", keep)
        # A best checkpoint may be newer than the last one when a run is killed between the two.
        self._best = self._manager("best", 2)

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint; None if there is none yet."""
        return self._last.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if there is none yet."""
        return self._best.latest_step()

    def save_last(self, state: TrainState, resume_state: dict[str, Any]) -> None:
        """Begins to save a last checkpoint; one of the same step gets the new resume state only.

        The state is copied or saved before this returns, so its buffers may be donated.

        Args:
          state: the train state.
          resume_state: all else that the loop needs to resume, as JSON types.

        Raises:
          CheckpointError: if this checkpoint, or one before it, cannot be written.
        """
        # The progress names the best checkpoint, which must be there first.
        self._finish(self._best)
        if self._last.latest_step() == int(state.step):
            self._finish(self._last)
            self._replace_resume_state(int(state.step), resume_state)
            return
        resume = ocp.args.JsonSave(resume_state)
        self._save(
            self._last,
            state,
            {"state": _present(state)},
            {RESUME: resume},
        )

    def save_best(self, state: TrainState) -> None:
        """Begins to replace the best checkpoint, unless it is of the same step already.

        Raises:
          CheckpointError: if this checkpoint, or one before it, cannot be written.
        """
        self._save(self._best, state, {"variables": state.variables}, {})

    def check(self) -> None:
        """Finds out whether a save in the background has failed meanwhile; takes no time.

        Raises:
          CheckpointError: if one has.
        """
        for manager in list(self._unfinished):
            if not manager.is_saving_in_progress():
                self._finish(manager)

    def wait(self) -> None:
        """Waits until all is on the disk.

        Raises:
          CheckpointError: if a checkpoint cannot be written.
        """
        self._finish(self._best)
        self._finish(self._last)

    def restore_last(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the last train state and its resume state, or those before if they are damaged.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          CheckpointError: if none of the checkpoints can be read, or too many files are open; they
            stay as they are.
          MemoryError: if there is too little memory to read one.
        """
        items = {
            "state": ocp.args.StandardRestore(_present(abstract)),
            RESUME: ocp.args.JsonRestore(),
        }
        unread: dict[int, str] = {}
        for step in sorted(self._last.all_steps(), reverse=True):
            restored, why = None, "another process cannot read it"
            no_memory = no_files = False
            try:
                restored = self._last.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:
                why, no_memory = reason(error), is_out_of_memory(error)
                no_files = is_out_of_files(error)
            # Neither says that the checkpoint is damaged.
            if any_process(no_memory or no_files):
                lack = CheckpointError if no_files else MemoryError
                raise lack(f"{self._folder / 'last' / str(step)}: {why}")
            if not any_process(restored is None):
                assert restored is not None
                self._delete_unread(unread)
                return abstract.replace(**restored["state"]), restored[RESUME]
            unread[step] = why
        told = "; ".join(f"{step}: {why}" for step, why in unread.items())
        raise CheckpointError(
            f"{self._folder / 'last'}: no checkpoint can be read, and all are kept; {told}"
        )

    def forget_best_after(self, step: int) -> None:
        """Removes best checkpoints of later steps, which a run that goes on from `step` repeats."""
        for later in [found for found in self._best.all_steps() if found > step]:
            self._best.delete(later)

    def restore_best(self, abstract: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Reads the best "params" and "batch_stats".

        Args:
          abstract: shapes, dtypes and shardings of both.
          step: the step of the best validation; that of the newest best checkpoint if None.

        Raises:
          CheckpointError: if they cannot be read.
        """
        items = ocp.args.Composite(variables=ocp.args.StandardRestore(abstract))
        with self._one_line_errors("the best checkpoint cannot be read"):
            return self._best.restore(step or self.best_step, args=items)["variables"]

    def close(self) -> None:
        """Ends the managers' threads; saves that are under way are finished first."""
        for manager in (self._last, self._best):
            # Whoever had to know of an error has called `wait`.
            with contextlib.suppress(Exception):
                manager.close()

    def _delete_unread(self, unread: dict[int, str]) -> None:
        """Deletes checkpoints newer than the one that was read, and says why.

        A damaged one would be taken for a saved one when training gets there again.
        """
        for step, why in unread.items():
            path = self._folder / "last" / str(step)
            print(f"{path}: cannot be read: {why}", file=sys.stderr)
            self._last.delete(step)

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Orbax turns off all that writes or cleans up for a manager that only reads.
            read_only=self._read_only,
            cleanup_tmp_directories=True,
            # Both may be saving at a time, when processes would meet at barriers of equal names.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=name
            ),
        )
        with self._one_line_errors("cannot be written"):
            return ocp.CheckpointManager(self._folder / name, options=options)

    def _save(
        self,
        manager: ocp.CheckpointManager,
        state: TrainState,
        arrays: dict[str, Any],
        others: dict[str, Any],
    ) -> None:
        """Begins to save arrays of a state, and other items as orbax's arguments."""
        step = int(state.step)
        # A run that is interrupted before its next step has nothing new to save.
        if manager.latest_step() == step:
            return
        self._finish(manager)
        # On CPU orbax would go on reading the buffers that the next step reuses: small states are
        # copied, large ones are waited for, since a copy beside the next step might not fit.
        on_cpu = jax.default_backend() == "cpu"
        large = sum(array.nbytes for array in jax.tree.leaves(arrays)) > LARGEST_COPY
        items = {
            name: ocp.args.StandardSave(
                jax.tree.map(jnp.copy, part) if on_cpu and not large else part
            )
            for name, part in arrays.items()
        }
        with self._one_line_errors("cannot be written"):
            manager.save(step, args=ocp.args.Composite(**items, **others))
        self._unfinished.append(manager)
        if on_cpu and large:
            self._finish(manager)
            # Orbax leaves arrays in reference cycles.
            gc.collect()
            return_freed_memory()

    def _finish(self, manager: ocp.CheckpointManager) -> None:
        if manager in self._unfinished:
            self._unfinished.remove(manager)
            with self._one_line_errors("cannot be written"):
                manager.wait_until_finished()

    def _replace_resume_state(self, step: int, resume_state: dict[str, Any]) -> None:
        """Writes the resume state of a step that is saved already, unless it is the same."""
        if not is_main():
            return
        path = self._folder / "last" / str(step) / RESUME / RESUME_FILE
        text = json.dumps(resume_state)
        with self._one_line_errors("cannot be written"):
            if path.read_text(encoding="utf-8") != text:
                write_text(path, text)

    @contextlib.contextmanager
    def _one_line_errors(self, what: str) -> Iterator[None]:
        """Turns whatever orbax raises into a `CheckpointError`."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(f"{self._folder}: {what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Returns the operating system's reason within an error of orbax, or the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := REASONS.search(str(error)):
        return found[0]
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


@functools.cache
def _ignore_closed_loops() -> None:
    """Keeps tensorstore's late reports to an event loop, which orbax closed, off the screen."""
    hook = sys.unraisablehook

    def ignore(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = ignore


def _present(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state by name, without those that are None.

    States of older versions, which had no such parts, then have the same structure.
    """
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if part is not None}
