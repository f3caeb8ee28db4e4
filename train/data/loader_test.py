import dataclasses
import itertools
import threading

import numpy as np
import pytest

from train.data.crops import RandomCrop, RandomRotatedCrop
from train.data.loader import Batches, auto_roi
from train.data.preprocess import Sample
from train.data.testing import sample

ROI = (8, 6, 10)
PLAIN = RandomCrop(ROI)


def stream(seed=0, **options):
    samples = [sample((9, 5, 12 + i), seed=i, name=str(i)) for i in range(5)]
    return Batches(samples, RandomRotatedCrop(ROI, probability=1.0), 2, seed, **options)


def take(batches, count):
    out = list(itertools.islice(batches, count))
    batches.close()
    return out


def same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_shapes_and_types():
    (batch,) = take(stream(), 1)
    assert batch["image"].shape == (2, *ROI, 2)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (2, *ROI)
    assert batch["label"].dtype == np.int32


def test_same_seed_same_stream_other_seed_other_stream():
    first = take(stream(), 6)
    assert same(first, take(stream(), 6))
    assert not same(first, take(stream(seed=1), 6))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_restored_stream_goes_on_as_the_original(steps):
    original = stream()
    for _ in range(steps):
        next(original)
    restored = stream()
    next(restored)
    restored.restore(original.state())
    assert same(take(original, 5), take(restored, 5))


def test_every_epoch_has_every_case_once():
    samples = [
        Sample(str(i), np.full((*ROI, 1), i, np.float32), np.zeros(ROI, np.int32), (1, 1, 1))
        for i in range(6)
    ]
    batches = take(Batches(samples, PLAIN, 2, 0), 9)
    seen = np.concatenate([batch["image"][:, 0, 0, 0, 0] for batch in batches]).reshape(3, 6)
    assert [sorted(epoch) for epoch in seen.tolist()] == [[0, 1, 2, 3, 4, 5]] * 3
    assert len({tuple(epoch) for epoch in seen.tolist()}) > 1


def test_a_case_is_cropped_anew_in_every_epoch():
    crop = RandomCrop(ROI, foreground_fraction=0.0)
    batches = take(Batches([sample((30, 30, 30))], crop, 1, 0), 5)
    assert len({float(batch["image"][0, 0, 0, 0, 1]) for batch in batches}) == 5


def test_shards_of_two_processes_are_the_whole_batch():
    whole = take(stream(), 3)
    halves = [take(stream(shard=(i, 2)), 3) for i in range(2)]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)
    ]
    assert same(joined, whole)


class Unreadable(list):
    """Cases of which one cannot be had."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("case 3 is gone")
        return super().__getitem__(index)


def test_a_crop_draws_from_a_generator_of_its_number():
    def draw(case, rng):
        return dataclasses.replace(case, image=np.full_like(case.image, rng.random()))

    batches = take(Batches([sample(ROI), sample(ROI)], draw, 2, seed=7), 2)
    drawn = np.concatenate([batch["image"][:, 0, 0, 0, 0] for batch in batches])
    expected = [np.random.default_rng((7, 1, number)).random() for number in range(4)]
    np.testing.assert_array_equal(drawn, np.float32(expected))


def test_errors_in_the_background_reach_the_consumer_at_their_batch():
    samples = [sample(ROI, seed=i) for i in range(5)]
    whole = take(Batches(samples, PLAIN, 1, 0), 5)
    batches = Batches(Unreadable(samples), PLAIN, 1, 0)
    before = []
    with pytest.raises(OSError, match="case 3 is gone"):
        before.extend(iter(lambda: next(batches), None))
    assert len(before) < 5
    assert batches.state() == {"step": len(before)}
    # Asking again is no way around it.
    with pytest.raises(OSError, match="case 3 is gone"):
        next(batches)
    batches.restore({"step": len(before) + 1})
    assert same(before, whole[: len(before)])
    after = list(itertools.islice(batches, 4 - len(before)))
    assert same(after, whole[len(before) + 1 :])
    batches.close()


def test_close_stops_the_threads():
    before = set(threading.enumerate())
    batches = stream()
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_the_time_that_next_waits_is_counted():
    started = threading.Event()

    def slow(case, rng):
        started.wait(0.05)
        return PLAIN(case, rng)

    batches = Batches([sample(ROI)], slow, 1, 0)
    assert batches.waited == 0
    next(batches)
    assert batches.waited >= 0.05
    batches.close()


def test_unusable_batch_sizes():
    with pytest.raises(ValueError, match="batch_size=3: must be a multiple of 2 processes"):
        Batches([sample(ROI)], PLAIN, 3, 0, shard=(0, 2))
    with pytest.raises(ValueError, match="samples: must have"):
        Batches([], PLAIN, 3, 0)


def test_auto_roi():
    shapes = [(35, 50, 35), (36, 51, 34), (30, 81, 57)]
    assert auto_roi(shapes, (16, 16, 8)) == (48, 64, 40)
    assert auto_roi([(512, 512, 20)], (16, 16, 8)) == (96, 96, 24)
