import types

import jax
import numpy as np
import pytest

import train.program
from train.command_line import parse
from train.program import compile_program, compile_program_of_any_length, make_model
from train.sharding import make_mesh, replicated, shard_batch
from train.stand_in import Small
from train.state import create_state
from unetr_flax import UNETRConfig

MODEL = Small(types.SimpleNamespace(img_size=(4, 6, 8), in_channels=2, out_channels=3))


@pytest.fixture
def batch():
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 2)).astype(np.float32)
    label = np.digitize(image[..., 0], [-0.5, 0.5]).astype(np.int32)
    return shard_batch({"image": image, "label": label}, make_mesh())


def trained(program, batch, steps):
    state = create_state(MODEL, program.tx, 0, replicated(make_mesh()))
    for _ in range(steps):
        state, _ = program.train_step(state, batch)
    return jax.device_get(state.params)


def test_a_program_of_any_length_does_what_that_of_its_length_does(batch, compiled):
    cfg = parse(["--warmup-fraction", "0.25"])
    of_length = compile_program_of_any_length(cfg, MODEL, make_mesh(), False, check=lambda _: None)
    before = None
    for total in (60, 200):
        fixed, any_length = (
            compile_program(cfg, MODEL, make_mesh(), False, total, check=lambda _: None),
            of_length(total),
        )
        rates = [float(fixed.learning_rate(step)) for step in range(total)]
        np.testing.assert_allclose(
            [float(any_length.learning_rate(step)) for step in range(total)],
            rates,
            # The warm-up of the standard length ends between two steps of this one.
            atol=0.03 * max(rates),
        )
        parameters = trained(any_length, batch, 8)
        np.testing.assert_allclose(
            parameters["Dense_0"]["kernel"],
            trained(fixed, batch, 8)["Dense_0"]["kernel"],
            rtol=0.05,
        )
        if before is not None:
            assert not np.allclose(before["Dense_0"]["kernel"], parameters["Dense_0"]["kernel"])
        before = parameters
    # One program for all lengths, one for each that is fixed.
    assert sum("train_step" in name for name in compiled) == 3
    assert train.program.STANDARD_STEPS > 200


def test_the_options_of_the_model_reach_it():
    config = UNETRConfig.reference((16, 16, 16), 1, 2)
    args = ["--remat", "--dtype", "bfloat16", "--stochastic-depth", "0.1"]
    plain, model = (make_model(parse(options), config) for options in ([], args))
    assert (plain.remat, plain.dtype, plain.stochastic_depth) == (False, "float32", 0.0)
    assert (model.remat, model.dtype, model.stochastic_depth) == (True, "bfloat16", 0.1)


def test_the_options_of_the_optimizer_reach_the_step(batch):
    def kernel(*args):
        cfg = parse(["--learning-rate", "0.1", *args])
        program = compile_program(cfg, MODEL, make_mesh(), False, 10, check=lambda _: None)
        return trained(program, batch, 4)["Dense_0"]["kernel"]

    plain = kernel()
    for option, value in (("--b2", "0.5"), ("--weight-decay", "0.5"), ("--optimizer", "muon")):
        assert not np.allclose(kernel(option, value), plain, rtol=1e-4), option
