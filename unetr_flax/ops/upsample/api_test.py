import itertools

import jax
import jax.numpy as jnp
import pytest

from unetr_flax.ops.platform import target_platform
from unetr_flax.ops.testing import assert_close, random, value_and_gradients
from unetr_flax.ops.upsample import api, tpu, xla


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Runs the lowering of CPU or TPU on CPU, where both work."""
    if request.param == "tpu":
        monkeypatch.setitem(api.PLATFORMS, "cpu", tpu)
    return request.param


SIZES = [(strides, (3, 4, 2)) for strides in itertools.product((1, 2), repeat=3)]
# On TPU slices are those along the longest axis.
SIZES += [((2, 1, 2), (4, 3, 2)), ((1, 2, 2), (3, 2, 4)), ((2, 1), (3, 4)), ((2,), (3,))]


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(("strides", "size"), SIZES)
def test_upsampling_and_its_gradients_are_those_of_xla(strides, size):
    with jax.enable_x64(True):
        x = random(0, (2, *size, 5))
        kernel = random(1, (*strides, 5, 4))

        def theirs(x, kernel):
            mirrored = jnp.flip(kernel, range(len(strides)))
            return xla.upsample(x, mirrored, None, None)

        found = value_and_gradients(
            lambda x, kernel: api.upsample(x, kernel, None, None), x, kernel
        )
        for a, b in zip(found, value_and_gradients(theirs, x, kernel), strict=True):
            assert_close(a, b)


def test_tpus_convolve_few_channels_only(monkeypatch):
    used = []
    monkeypatch.setattr(tpu, "upsample", lambda x, kernel, **_: used.append(kernel.shape) or x)

    def trace(*kernel):
        used.clear()
        x = jax.ShapeDtypeStruct((2, *[4] * (len(kernel) - 2), kernel[-2]), jnp.float32)
        weights = jax.ShapeDtypeStruct(kernel, jnp.float32)
        with target_platform("tpu"):
            jax.eval_shape(lambda x, kernel: api.upsample(x, kernel, None, None), x, weights)
        return bool(used)

    assert trace(2, 2, 2, 3, tpu.FILLED_LANES)
    assert not trace(2, 2, 2, 3, tpu.FILLED_LANES + 1)
    assert not trace(2, 2, 3, 4)
