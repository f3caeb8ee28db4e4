"""Trains MONAI's UNETR in PyTorch on the data of a run: the rival in `benchmarks.learning`.

It takes the options of `python -m train`, and shares with it the split, the crops, their random
changes, the schedule of the learning rate and the validation. Model, loss, optimizer and arithmetic
are those of MONAI and PyTorch.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import torch
from monai.losses.dice import DiceCELoss

from benchmarks.learning_curve import CURVE, Point
from train.budget import seconds
from train.command_line import parse
from train.config import Config
from train.console import make_console
from train.data.augment import AUGMENTATIONS
from train.data.dataset import BadCasesError, DataError
from train.data.loader import Batches
from train.optim import learning_rate_schedule
from train.program import make_changes
from train.run_dir import OptionError
from train.task import Task, prepare
from train.validate import Evaluator
from unetr_flax.parity.torch_models import TorchModelError, torch_model_of
from unetr_flax.parity.twins import channels_first_tensor

VALIDATIONS = 8
# Entries of the table of learning rates.
RATES = 10_000


class Clock:
    """Seconds of training, without what is left out."""

    def __init__(self):
        self._started = time.perf_counter()
        self._left_out = 0.0

    def __call__(self) -> float:
        """Returns the seconds so far."""
        return time.perf_counter() - self._started - self._left_out

    def leave_out(self, since: float) -> None:
        """Stops counting what came after `since`, a value of this clock."""
        self._left_out += self() - since


class Rival:
    """MONAI's UNETR in training.

    Args:
      cfg: the options of the run.
      task: its data and model.
    """

    def __init__(self, cfg: Config, task: Task):
        torch.manual_seed(cfg.training.seed)
        self.cfg, self.task = cfg, task
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = torch_model_of(task.model_config).to(self._device)
        self._loss = DiceCELoss(to_onehot_y=True, softmax=True)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=cfg.training.learning_rate,
            betas=(0.9, cfg.training.b2),
            weight_decay=cfg.training.weight_decay,
        )
        options = cfg.training
        rate = learning_rate_schedule(
            options.learning_rate, RATES, options.warmup_fraction, options.schedule
        )
        self._rates = np.asarray(jax.vmap(rate)(np.arange(RATES + 1)))
        self._batches = Batches(
            task.train_samples,
            AUGMENTATIONS[cfg.augmentation.augmentation].crop(task.model_config.img_size),
            cfg.data.batch_size,
            cfg.training.seed,
        )
        changes = make_changes(cfg)
        self._change = None if changes is None else jax.jit(changes)
        self._keys = jax.random.key(cfg.training.seed)
        self._evaluator = Evaluator(
            self._predict,
            task.model_config,
            task.dataset,
            task.val_cases,
            task.preprocessing,
            cfg.training.overlap,
        )

    def step(self, share: float) -> float:
        """Takes a step and returns its loss.

        Args:
          share: share of the training that is over, on which the learning rate depends as in our
            own trainings.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = float(self._rates[min(int(share * RATES), RATES)])
        batch = next(self._batches)
        image, label = batch["image"], batch["label"]
        if self._change is not None:
            self._keys, key = jax.random.split(self._keys)
            image, label = self._change(jax.random.split(key, len(label)), image, label)
        x = channels_first_tensor(np.array(image)).to(self._device)
        target = torch.from_numpy(np.array(label))[:, None].to(self._device)
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._model(x), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.cfg.training.clip_norm)
        self._optimizer.step()
        return float(loss.detach())

    def validate(self) -> float:
        """Returns the mean foreground Dice of the validation cases on their own grids."""
        # The weights are the model's own, and nobody interrupts.
        state: Any = SimpleNamespace(variables={})
        nobody: Any = SimpleNamespace(requested=False)
        found = self._evaluator(state, nobody)
        assert found is not None
        return found.mean_foreground

    def close(self) -> None:
        """Stops the threads that make batches."""
        self._batches.close()

    def _predict(self, variables: Any, windows: np.ndarray) -> np.ndarray:
        del variables  # The model has them.
        self._model.eval()
        with torch.no_grad():
            logits = self._model(channels_first_tensor(np.asarray(windows)).to(self._device))
        return np.moveaxis(logits.cpu().numpy(), 1, -1)


def train(rival: Rival, budget: float, clock: Clock, path: Path) -> list[Point]:
    """Trains for `budget` seconds of the clock; appends each validation to a file.

    Raises:
      OptionError: if they are over already.
    """
    points: list[Point] = []
    started = clock()
    if started >= budget:
        raise OptionError(f"--budget: {started:.0f} s passed before the first step")
    rest = budget - started
    step = 0
    for part in range(1, VALIDATIONS + 1):
        losses = []
        # The rate follows the clock, so that the time is used up however long steps take.
        while (share := (clock() - started) / rest) < part / VALIDATIONS:
            losses.append(rival.step(share))
        if not losses:
            continue
        step += len(losses)
        now = clock()
        points.append(Point(now, step, rival.validate()))
        clock.leave_out(now)
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(points[-1])) + "\n")
        told = f"step {step} loss {np.mean(losses):.3g} mean_dice {points[-1].dice:.4f}"
        print(told, flush=True)
    return points


def main(args: list[str]) -> int:
    """Trains with the options of `python -m train`, of which --budget must be given."""
    clock = Clock()
    cfg = parse(args)
    try:
        cfg.check()
        if cfg.training.budget is None or cfg.model.family != "monai":
            raise OptionError("--budget: must be given, and --family must be monai")
        task = prepare(cfg, make_console())
        rival = Rival(cfg, task)
    except (ValueError, OptionError, DataError, BadCasesError, TorchModelError) as error:
        print(error, file=sys.stderr)
        return 1
    cfg.out.mkdir(parents=True, exist_ok=True)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    try:
        train(rival, seconds(cfg.training.budget), clock, cfg.out / CURVE)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        rival.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
