"""Tests of the model's TPU lowering, run on CPU, against its CPU lowering."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import UNETR, UNETRConfig, ops
from unetr_flax.ops.conv3x3x3 import tpu_slabs
from unetr_flax.ops.features import DeferredNorm
from unetr_flax.ops.norm import tpu_in_place


def config(family):
    options = {"hidden_size": 16, "num_heads": 2}
    if family == "monai":
        return UNETRConfig.monai((16, 16, 32), 2, 3, feature_size=2, mlp_dim=32, **options)
    return UNETRConfig.reference((16, 16, 32), 2, 3, light_r=32, num_layers=4, **options)


@pytest.mark.parametrize("family", ["reference", pytest.param("monai", marks=pytest.mark.slow)])
def test_the_tpu_s_program_computes_the_same_gradients(monkeypatch, family):
    """Checks the gradients with `remat` and with large arrays split into parts."""
    cfg = config(family)
    norms_in_slabs = []
    own = tpu_slabs._own

    def spy(x, start, size):
        norms_in_slabs.append(isinstance(x, DeferredNorm))
        return own(x, start, size)

    monkeypatch.setattr(tpu_slabs, "_own", spy)
    with jax.enable_x64(True):
        model = UNETR(cfg, param_dtype=jnp.float64, remat=True)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *cfg.img_size, 2)))
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            given = {**variables, "params": params}
            logits, updated = model.apply(given, x, train=True, mutable=["batch_stats"])
            return jnp.square(jnp.sin(logits)).mean(), updated

        def results(platform):
            gradients = ops.target_platform(platform)(jax.value_and_grad(loss, has_aux=True))
            return jax.jit(gradients)(variables["params"])

        expected = results("cpu")
        monkeypatch.setattr(tpu_slabs, "SLAB_BYTES", 2**18)
        monkeypatch.setattr(tpu_in_place, "PART_BYTES", 2**16)
        found = results("tpu")
    assert any(norms_in_slabs) == (family == "reference")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The gradients of biases before norms are rounding errors only.
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * largest)


def test_devices_that_share_a_batch_exchange_no_volumes():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unetr_flax import ops
from unetr_flax.model.blocks import Conv3DBlock, Deconv3DBlock
from unetr_flax.ops.norm import tpu_in_place
from unetr_flax.ops.conv3x3x3 import tpu_slabs
tpu_slabs.SLAB_BYTES = tpu_in_place.PART_BYTES = 1
# The TPU's compiler can shard arrays with a layout constraint, the CPU's cannot.
tpu_slabs.compact = lambda slab: slab
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (4, 4, 6, 5, 3))
first = Deconv3DBlock(4, (2, 1, 2), remat=True, param_dtype=x.dtype)
second = Conv3DBlock(4, remat=True, param_dtype=x.dtype)

def apply(params, x):
    y, _ = first.apply({"params": params[0]}, x, train=True, mutable=["batch_stats"])
    y, _ = second.apply({"params": params[1]}, y, train=True, mutable=["batch_stats"])
    return y

@jax.jit
@ops.target_platform("tpu")
def step(params, x):
    return jax.value_and_grad(lambda *given: jnp.square(apply(*given)).mean())(params, x)

y = jnp.zeros((4, 8, 6, 10, 4))
params = [first.init(jax.random.key(1), x)["params"], second.init(jax.random.key(2), y)["params"]]
alone = step(params, x)
sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
program = step.lower(params, sharded).compile().as_text()
assert "all-reduce" in program and "while" in program
for exchange in ("all-gather", "all-to-all", "collective-permute"):
    assert exchange not in program, exchange
for a, b in zip(jax.tree.leaves(step(params, sharded)), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
