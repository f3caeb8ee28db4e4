import jax
import numpy as np

from unetr_flax.ops.platform import by_platform
from unetr_flax.parity.run_once import jit_to_run_once, run_once


def test_one_platforms_branches_are_traced():
    traced = []

    def branch(name):
        def double(x):
            traced.append(name)
            return 2 * x

        return double

    def function(x):
        return by_platform(x, default=branch("default"), cpu=branch("cpu"))

    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(run_once(function, x), 2 * x)
    # "gpu" stands for several of XLA's platforms, so all branches stay for it.
    expected = {"cpu": {"cpu"}, "tpu": {"default"}, "gpu": {"cpu", "default"}}
    assert set(traced) == expected[jax.default_backend()]
    np.testing.assert_array_equal(jit_to_run_once(function)(x), 2 * x)
