"""Checkpoints of a run: the last, from which it is resumed, and the best, which is its result.

A run's folder holds
  run.json            how the run was started; written once
  checkpoints/last/   train state and resume state (place in the data, progress of the loop)
  checkpoints/best/   parameters and running statistics with the best mean foreground Dice
Orbax writes each checkpoint to a temporary folder and renames it, so a checkpoint that exists is
complete.
"""

import dataclasses
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from train.state import TrainState

# Name of the resume state within a checkpoint.
RESUME = "progress"


class Checkpoints:
    """The two checkpoints of one run; every process of the run must make the same calls.

    Args:
      folder: holds both; made if absent.
    """

    def __init__(self, folder: Path):
        # Saving must not be asynchronous: the next step reuses the state's buffers.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        folder = folder.absolute()
        self._last = ocp.CheckpointManager(folder / "last", options=options)
        self._best = ocp.CheckpointManager(folder / "best", options=options)

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint; None if there is none yet."""
        return self._last.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if there is none yet."""
        return self._best.latest_step()

    def save_last(self, state: TrainState, resume_state: dict[str, Any]) -> None:
        """Replaces the last checkpoint, unless it is of the same step already.

        Args:
          state: the train state.
          resume_state: all else that the loop needs to resume, as JSON types.
        """
        items = {
            "state": ocp.args.StandardSave(_present(state)),
            RESUME: ocp.args.JsonSave(resume_state),
        }
        _save(self._last, int(state.step), items)

    def save_best(self, state: TrainState) -> None:
        """Replaces the best checkpoint, unless it is of the same step already."""
        _save(self._best, int(state.step), {"variables": ocp.args.StandardSave(state.variables)})

    def restore_last(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the last train state and its resume state.

        Args:
          abstract: shapes, dtypes and shardings of the state.
        """
        items = {
            "state": ocp.args.StandardRestore(_present(abstract)),
            RESUME: ocp.args.JsonRestore(),
        }
        restored = self._last.restore(self.last_step, args=ocp.args.Composite(**items))
        return abstract.replace(**restored["state"]), restored[RESUME]

    def restore_best(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads the best "params" and "batch_stats".

        Args:
          abstract: shapes, dtypes and shardings of both.
        """
        items = {"variables": ocp.args.StandardRestore(abstract)}
        return self._best.restore(self.best_step, args=ocp.args.Composite(**items))["variables"]

    def close(self) -> None:
        """Ends the managers' threads."""
        self._last.close()
        self._best.close()


def _present(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state by name, without those that are None.

    States of older versions, which had no such parts, then have the same structure.
    """
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if part is not None}


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> None:
    # A run that is interrupted before its next step has nothing new to save.
    if manager.latest_step() != step:
        manager.save(step, args=ocp.args.Composite(**items))
