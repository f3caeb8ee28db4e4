from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.worker import profile, top_operations


class Side:
    def __init__(self):
        self._step = jax.jit(lambda x: (x @ x).sum())
        self._x = jnp.ones((256, 256))

    def step(self):
        return float(self._step(self._x))


def test_a_profile_lists_the_longest_operations(tmp_path):
    side = Side()
    side.step()
    path = profile(side, tmp_path)["trace"]
    lines = Path(path).read_text().splitlines()
    assert lines
    spent = [float(line.split()[0]) for line in lines]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0


def test_calls_of_an_operation_are_added_up():
    def event(name, milliseconds):
        stats = {"hlo_op": name}.items() if name else ()
        return Part(stats=stats, duration_ns=milliseconds * 1e6)

    line = Part(events=[event("dot.1", 2), event("add", 5), event("dot.1", 4), event(None, 99)])
    text = top_operations(Part(planes=[Part(lines=[line])]), 1)
    assert text.split() == ["6.00", "ms", "2", "x", "dot.1"]


class Part:
    def __init__(self, **fields):
        vars(self).update(fields)
