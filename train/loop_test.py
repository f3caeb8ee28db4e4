import json
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from train.checkpoint import Checkpoints
from train.data.crops import default_crop
from train.data.loader import Batches
from train.data.preprocess import Sample
from train.log import RunLog
from train.loop import DivergenceError, Progress, Schedule, fit
from train.losses import dice_cross_entropy_loss
from train.scores import Validation
from train.stand_in import Small
from train.state import abstract_state, create_state
from train.step import make_train_step
from unetr_flax.evaluation.dice import DiceScores

MODEL = Small(types.SimpleNamespace(img_size=(4, 6, 8), in_channels=2, out_channels=3))
TX = optax.adam(1e-2)
TIMES = ("seconds", "waiting_for_data")
CLASSES = ("background", "a", "b")
SCHEDULE = Schedule.of_epochs(3, 4, 2)
SHARDING = SingleDeviceSharding(jax.devices()[0])


class StopAfter:
    """An interrupt that comes in the midst of a step."""

    def __init__(self, steps=None):
        self._steps_left = steps
        self.requested = False

    def step_begins(self):
        if self._steps_left is not None:
            self._steps_left -= 1
            self.requested = self._steps_left <= 0


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(MODEL, TX, dice_cross_entropy_loss, SHARDING)


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [
        Sample(
            name=str(i),
            image=rng.normal(size=(6, 7, 8, 2)).astype(np.float32),
            label=rng.integers(0, 3, (6, 7, 8)).astype(np.int32),
            spacing=(1.0, 1.0, 2.0),
        )
        for i in range(6)
    ]


def by_step(means):
    """Makes an evaluation whose mean foreground Dice is given for each step."""
    calls = []

    def evaluate(state):
        calls.append(int(state.step))
        mean = means[int(state.step)]
        return None if mean is None else Validation(DiceScores(np.array([0.9, mean, mean]), mean))

    evaluate.calls = calls
    return evaluate


def go(
    folder, samples, train_step, stop_after=None, evaluate=None, schedule=SCHEDULE, averaged=False
):
    """Runs one process, from the last checkpoint, if there is one, to the end or a stop."""
    checkpoints = Checkpoints(folder)
    batches = Batches(samples, default_crop((4, 6, 8)), 2, seed=0)
    progress = Progress()
    if checkpoints.last_step is None:
        state = create_state(MODEL, TX, 0, SHARDING, averaged=averaged)
    else:
        state, resume_state = checkpoints.restore_last(abstract_state(MODEL, TX, SHARDING))
        batches.restore(resume_state["batches"])
        progress = Progress(**resume_state["progress"])
    interrupt = StopAfter(stop_after)

    def shard_batch(batch):
        interrupt.step_begins()
        return batch

    try:
        with RunLog(
            folder,
            CLASSES,
            schedule.total_steps,
            schedule.steps_per_epoch,
            int(state.step),
            progress.validated_step,
        ) as log:
            return fit(
                state,
                progress,
                schedule=schedule,
                batches=batches,
                train_step=train_step,
                shard_batch=shard_batch,
                evaluate=evaluate or by_step({6: 0.5, 12: 0.4}),
                learning_rate=lambda step: 0.1 * step,
                checkpoints=checkpoints,
                log=log,
                interrupt=interrupt,
            )
    finally:
        batches.close()
        checkpoints.close()


def kept(folder):
    """Leaves of the last checkpoint, and what else is in it."""
    checkpoints = Checkpoints(folder)
    state, resume_state = checkpoints.restore_last(abstract_state(MODEL, TX, SHARDING))
    checkpoints.close()
    return jax.device_get(state), resume_state


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines
    ]


# Within an epoch, at the end of one, and at a validation.
@pytest.mark.parametrize("stops", [(2, 2), (3,), (6,), (1, 4, 2)])
def test_interrupted_runs_end_bit_for_bit_like_straight_ones(tmp_path, samples, train_step, stops):
    assert go(tmp_path / "straight", samples, train_step)
    for i, steps in enumerate(stops):
        assert not go(tmp_path / "parts", samples, train_step, stop_after=steps)
        assert kept(tmp_path / "parts")[0].step == sum(stops[: i + 1])
    assert go(tmp_path / "parts", samples, train_step)

    straight, resume_state = kept(tmp_path / "straight")
    parts, parts_resume_state = kept(tmp_path / "parts")
    assert straight.step == 12
    jax.tree.map(np.testing.assert_array_equal, straight, parts)
    assert resume_state == parts_resume_state
    assert records(tmp_path / "straight") == records(tmp_path / "parts")


def test_validates_when_due_and_keeps_the_best(tmp_path, samples, train_step):
    schedule = Schedule.of_epochs(2, 5, 2)
    evaluate = by_step({4: 0.3, 8: 0.6, 10: 0.5})
    assert go(tmp_path, samples, train_step, evaluate=evaluate, schedule=schedule)
    assert evaluate.calls == [4, 8, 10]
    # The best before is kept besides.
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["4", "8"]
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["10"]
    progress = Progress(**kept(tmp_path)[1]["progress"])
    assert progress.best_step == 8
    assert progress.best.mean_foreground == 0.6
    assert progress.best.per_class.tolist() == [0.9, 0.6, 0.6]

    # A run that is complete has nothing left to do.
    assert go(tmp_path, samples, train_step, evaluate=evaluate, schedule=schedule)
    assert evaluate.calls == [4, 8, 10]


def test_an_interrupted_validation_is_done_again(tmp_path, samples, train_step):
    assert not go(tmp_path, samples, train_step, 6, by_step({6: None}))
    again = by_step({6: 0.5, 12: 0.4})
    assert go(tmp_path, samples, train_step, evaluate=again)
    assert again.calls == [6, 12]


def test_a_run_that_is_cut_off_within_a_validation_goes_on_from_its_step(
    tmp_path, samples, train_step
):
    def cut_off(state):
        raise MemoryError

    assert go(tmp_path / "straight", samples, train_step)
    with pytest.raises(MemoryError):
        go(tmp_path / "parts", samples, train_step, evaluate=cut_off)
    assert kept(tmp_path / "parts")[0].step == 6
    assert go(tmp_path / "parts", samples, train_step)
    straight, resume_state = kept(tmp_path / "straight")
    parts, parts_resume_state = kept(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, straight, parts)
    assert resume_state == parts_resume_state
    assert records(tmp_path / "straight") == records(tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts" / "last").iterdir()] == ["12"]


@pytest.mark.parametrize("place", ["validation", "save_best", "step"])
def test_a_validation_that_was_broken_off_is_recorded_once_if_the_run_is_cut_off_later(
    tmp_path, samples, train_step, monkeypatch, place
):
    assert go(tmp_path / "straight", samples, train_step)
    assert not go(tmp_path / "parts", samples, train_step, 6, by_step({6: None}))

    def cut_off(*args):
        raise KeyboardInterrupt

    def record_and_cut_off(log, *args):
        validation(log, *args)
        cut_off()

    validation = RunLog.validation
    with monkeypatch.context() as patch:
        if place == "validation":
            patch.setattr(RunLog, "validation", record_and_cut_off)
        elif place == "save_best":
            patch.setattr(Checkpoints, "save_best", cut_off)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "parts", samples, cut_off if place == "step" else train_step)
    again = by_step({6: 0.5, 12: 0.4})
    assert go(tmp_path / "parts", samples, train_step, evaluate=again)
    assert again.calls == ([12] if place == "step" else [6, 12])
    assert records(tmp_path / "parts") == records(tmp_path / "straight")


def test_logs_the_mean_over_the_epoch(tmp_path, samples, train_step):
    losses = []

    def recording(state, batch):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        return state, metrics

    go(tmp_path, samples, recording)
    train = [r for r in records(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in train] == [3, 6, 9, 12]
    for i, record in enumerate(train):
        assert record["loss"] == pytest.approx(np.mean(losses[3 * i : 3 * i + 3]), rel=1e-6)
        assert record["learning_rate"] == pytest.approx(0.1 * (record["step"] - 1))


@pytest.mark.parametrize("better", ["validation", "validation_average"])
def test_the_better_of_weights_and_their_average_is_kept(tmp_path, samples, better):
    seen = []

    def evaluate(state):
        seen.append(jax.device_get(state.variables))
        mean = 0.7 if (len(seen) == 1) == (better == "validation") else 0.6
        return Validation(DiceScores(np.array([0.9, mean, mean]), mean))

    train_step = make_train_step(MODEL, TX, dice_cross_entropy_loss, SHARDING, ema_decay=0.9)
    schedule = Schedule.of_epochs(2, 1, 1)
    go(tmp_path, samples, train_step, evaluate=evaluate, schedule=schedule, averaged=True)
    kinds = [(r["kind"], r["step"]) for r in records(tmp_path)]
    assert kinds == [("train", 2), ("validation", 2), ("validation_average", 2)]
    checkpoints = Checkpoints(tmp_path)
    abstract = abstract_state(MODEL, TX, SHARDING, averaged=True)
    best = checkpoints.restore_best(abstract.variables)
    last, _ = checkpoints.restore_last(abstract)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, best, seen[better == "validation_average"])
    jax.tree.map(np.testing.assert_array_equal, last.average, seen[1])
    assert not np.array_equal(*(v["params"]["Dense_0"]["kernel"] for v in seen))


def test_a_mean_that_is_nan_still_leaves_a_best(tmp_path, samples, train_step):
    assert go(tmp_path, samples, train_step, evaluate=by_step({6: np.nan, 12: np.nan}))
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"6", "12"}


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_stop(
    tmp_path, samples, train_step, capsys
):
    assert not go(tmp_path, samples, train_step, stop_after=2)

    def broken(state, batch):
        # Each fourth step is well.
        factor = 1.0 if int(state.step) % 4 == 3 else np.nan
        return train_step(state, batch | {"image": batch["image"] * np.float32(factor)})

    assert go(tmp_path, samples, broken)
    state, resume_state = kept(tmp_path)
    assert state.step == 12
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert resume_state["progress"]["skipped"] == 7
    shown = capsys.readouterr().out
    assert "step 3 skipped: the loss is nan" in shown
    train = [r for r in records(tmp_path) if r["kind"] == "train"]
    assert [r.get("skipped_steps") for r in train] == [1, 3, 5, 7]
    assert all(r["loss"] is None or r["loss"] > 0 for r in train if "loss" in r)

    def never(state, batch):
        return train_step(state, batch | {"image": batch["image"] * np.float32(np.inf)})

    longer = Schedule.of_epochs(3, 9, 9)
    with pytest.raises(
        DivergenceError,
        match=r"not finite in 10 steps in a row, up to step 22; the last checkpoint has step 12; "
        r".*--learning-rate",
    ):
        go(tmp_path, samples, never, schedule=longer)
    assert kept(tmp_path)[0].step == 12
