import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_parity
from benchmarks.device_parity import Row, compare, main

SIZES = {"img_size": (8, 16, 8), "patch_size": 8, "hidden_size": 8, "num_heads": 2}


class Small(nn.Module):
    """A stand-in for UNETR that compiles fast."""

    config: object
    dtype: object = None
    param_dtype: object = jnp.float32
    lowering: str = "auto"
    jit_blocks: bool = False
    factor = 1.0

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.gelu(nn.Conv(8, (3, 3, 3), **options)(x)) * jnp.asarray(self.factor, self.dtype)
        return nn.Conv(self.config.out_channels, (1, 1, 1), **options)(x)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(device_parity, "UNETR", Small)


def test_a_device_that_rounds_as_the_cpu_does_holds():
    rows = compare(jax.devices()[0], ("float64", "float32", "bfloat16"), **SIZES)
    assert [(row.what, row.dtype) for row in rows] == [
        ("logits", "float64"),
        ("gradients", "float64"),
        ("logits", "float32"),
        ("gradients", "float32"),
        ("logits", "bfloat16"),
        ("gradients", "bfloat16"),
    ]
    assert all(row.holds for row in rows)
    assert all(row.device < 1e-13 for row in rows[:2])
    assert all(0 < row.cpu < 1e-5 for row in rows[2:4])
    assert all(1e-4 < row.cpu < 0.05 for row in rows[4:])


def test_a_device_that_computes_no_number_in_one_draw_does_not(monkeypatch):
    exact = [(np.ones(2), np.ones(2))] * 3
    there = [*exact[:2], (np.array([1.0, np.nan]), np.ones(2))]
    monkeypatch.setattr(
        device_parity, "_run", lambda cfg, draws, device, *_: there if device == "there" else exact
    )
    logits, gradients = compare("there", ("float64",), **SIZES)
    assert not logits.holds
    assert gradients.holds


def test_a_device_that_computes_something_else_does_not(monkeypatch):
    put = jax.device_put
    used = []

    def there_or_here(x, device):
        used.append("there" if device == "there" else "here")
        monkeypatch.setattr(Small, "factor", 1.001 if device == "there" else 1.0)
        return put(x, jax.devices("cpu")[0])

    monkeypatch.setattr(jax, "device_put", there_or_here)
    rows = compare("there", ("float64", "float32"), **SIZES)
    assert [place for place, _ in itertools.groupby(used)] == ["here", "there", "here"]
    assert len(rows) == 4
    assert not any(row.holds for row in rows)
    assert all(row.cpu < 1e-6 < 1e-4 < row.device for row in rows)


def test_errors_are_judged_by_the_cpus():
    assert Row("logits", "float32", device=3e-5, cpu=1e-5).holds
    assert not Row("logits", "float32", device=5e-5, cpu=1e-5).holds
    assert Row("logits", "float32", device=1e-7, cpu=1e-9).holds
    assert not Row("logits", "float32", device=float("nan"), cpu=1e-5).holds
    assert Row("gradients", "float64", device=1e-11, cpu=0.0).holds
    assert not Row("gradients", "float64", device=1e-9, cpu=0.0).holds


def test_the_command_tells_people_and_programs(monkeypatch, capsys):
    rows = [Row("logits", "float32", 1e-7, 1e-7), Row("logits", "bfloat16", 1.0, 1e-3)]
    monkeypatch.setattr(device_parity, "compare", lambda device, dtypes: rows)
    assert main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "logits, float32: 1.0e-07 on the device, 1.0e-07 on CPU, holds",
        "logits, bfloat16: 1.0e+00 on the device, 1.0e-03 on CPU, DOES NOT HOLD",
    ]
    assert main(["--json", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["device"] == 1.0
