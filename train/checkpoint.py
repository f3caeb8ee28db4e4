"""Checkpoints of a run: the last, from which it goes on, and the best, which is its result.

A run's folder holds
  config.json         how the run was started; written once
  checkpoints/last/   state, position in the data and progress, after the last saved step
  checkpoints/best/   parameters and running statistics with the best mean foreground Dice
Orbax writes each checkpoint beside its place and renames it, so one that exists is whole.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from train.state import TrainState


class Checkpoints:
    """The two checkpoints of one run; every process of the run must make the same calls.

    Args:
      folder: where both live; made if absent.
    """

    def __init__(self, folder: Path):
        # Saving waits until all is written: the next step reuses the state's buffers.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        folder = folder.absolute()
        self._last = ocp.CheckpointManager(folder / "last", options=options)
        self._best = ocp.CheckpointManager(folder / "best", options=options)

    @property
    def last_step(self) -> int | None:
        """Step of the last checkpoint; None if there is none yet."""
        return self._last.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if there is none yet."""
        return self._best.latest_step()

    def save_last(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Replaces the last checkpoint, unless it is of this very step already.

        Args:
          state: what a step changes.
          progress: what else the loop needs to go on, as JSON has it.
        """
        items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
        _save(self._last, int(state.step), items)

    def save_best(self, state: TrainState) -> None:
        """Replaces the best checkpoint, likewise."""
        _save(self._best, int(state.step), {"variables": ocp.args.StandardSave(state.variables)})

    def restore_last(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last state and its progress.

        Args:
          abstract: shapes, dtypes and shardings of the state.
        """
        items = {
            "state": ocp.args.StandardRestore(abstract),
            "progress": ocp.args.JsonRestore(),
        }
        restored = self._last.restore(self.last_step, args=ocp.args.Composite(**items))
        return restored["state"], restored["progress"]

    def restore_best(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """The best "params" and "batch_stats".

        Args:
          abstract: shapes, dtypes and shardings of both.
        """
        items = {"variables": ocp.args.StandardRestore(abstract)}
        return self._best.restore(self.best_step, args=ocp.args.Composite(**items))["variables"]

    def close(self) -> None:
        """Ends the managers' threads."""
        self._last.close()
        self._best.close()


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> None:
    # A run that is resumed and interrupted before its next step has nothing new to save.
    if manager.latest_step() != step:
        manager.save(step, args=ocp.args.Composite(**items))
