import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import flax_side, torch_side
from benchmarks.cases import Case
from benchmarks.worker import answer_to, make_side, told
from unetr_flax import UNETRConfig
from unetr_flax.cudnn import CudnnError

CASE = Case("reference", 16, 2, "float32")


class Small(Case):
    """The same with a model that compiles fast."""

    @property
    def cfg(self):
        return UNETRConfig.reference(
            (16, 32, 16), 1, 4, light_r=16, hidden_size=16, num_heads=2, num_layers=4
        )


@pytest.fixture(scope="module")
def sides():
    with contextlib.ExitStack() as stack:
        case = Small("reference", 16, 2, "float32")
        yield {name: make_side(name, case, stack) for name in ("ours", "torch-channels-last")}


def test_both_sides_compute_the_same_and_tell_the_same_about_it(sides):
    for command in ("forward", "step", "step"):
        answers = [answer_to(command, side) for side in sides.values()]
        for ours, theirs in zip(*(answer["value"] for answer in answers), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert all(answer["wall"] > 0 for answer in answers)
    assert {side.device for side in sides.values()} == {jax.default_backend()}
    assert answer_to("peak", sides["ours"])["peak"] > 2**20
    logits = [side.to_host(side.forward()) for side in sides.values()]
    assert [x.shape for x in logits] == [(2, 16, 32, 16, 4)] * 2
    assert {x.dtype for x in logits} == {np.dtype(np.float32)}


def test_the_cost_is_that_of_the_model(sides):
    forward, step = (answer_to(f"cost {what}", sides["ours"]) for what in ("forward", "step"))
    assert answer_to("cost step", sides["torch-channels-last"]) == {}
    # A backward pass takes two products for each of the forward pass.
    assert 2.5 * forward["flops"] < step["flops"] < 3.5 * forward["flops"]
    assert step["traffic"] > forward["traffic"] > 0
    assert step["needed"] > forward["needed"] > 0


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.",
        "CUDA out of memory. Tried to allocate 20.00 GiB.",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_does_not_suffice_is_told(message):
    assert told(RuntimeError(message)) == {"failure": "out of memory"}
    assert told(MemoryError()) == {"failure": "out of memory"}


def test_other_errors_end_the_worker():
    with pytest.raises(RuntimeError, match="something else"):
        told(RuntimeError("something else"))
    assert told(CudnnError("cuDNN 9.10.2")) == {"error": "cuDNN 9.10.2"}


def test_a_cudnn_that_computes_wrongly_is_not_timed(monkeypatch):
    monkeypatch.setattr("unetr_flax.cudnn.cuda_devices", lambda: ["gpu"])
    monkeypatch.setattr("unetr_flax.cudnn.cudnn_version", lambda: (9, 10, 2))
    with pytest.raises(CudnnError, match=r"9\.10\.2"):
        flax_side.FlaxSide(dataclasses.replace(CASE, dtype="bfloat16"), {}, None, None, 0.1)
    assert torch_side.TorchSide.cost(None, "step") is None
