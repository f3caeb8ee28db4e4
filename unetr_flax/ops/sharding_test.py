"""Operations on volumes that devices share give the numbers of one device, on every platform."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    from jax.sharding import NamedSharding
    from unetr_flax import ops
    from unetr_flax.model.blocks import Conv3DBlock, Deconv3DBlock, UNetBlock
    from unetr_flax.model.decoder_spec import BlockStyle
    from unetr_flax.ops.conv3x3x3 import tpu_slabs
    from unetr_flax.ops.norm import tpu_in_place

    platform, *shape = sys.argv[1:]
    # Large arrays are computed in parts, which must be those of one device.
    tpu_slabs.SLAB_BYTES = tpu_in_place.PART_BYTES = 1
    # The TPU's compiler can shard arrays with a layout constraint, the CPU's cannot.
    tpu_slabs.compact = lambda slab: slab
    batch, depth = map(int, shape)
    mesh = jax.make_mesh((batch, depth), ("batch", "depth"), devices=jax.devices()[:batch * depth],
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = ops.VolumeSharding(mesh, ("batch",), "depth")
    style = BlockStyle("residual", "instance", None, False)
    blocks = [
        Deconv3DBlock(4, (2, 1, 2), param_dtype="float64"),
        Deconv3DBlock(4, (2, 2, 2), style, remat=True, param_dtype="float64"),
        UNetBlock(3, style, param_dtype="float64"),
        Conv3DBlock(5, remat=True, param_dtype="float64"),
        Conv3DBlock(5, kernel_size=1, param_dtype="float64"),
    ]
    x = jax.random.normal(jax.random.key(0), (4, 4, 2, 3, 3), "float64")
    params, y = [], x
    for block in blocks:
        params.append(block.init(jax.random.key(1), y)["params"])
        y = block.apply({"params": params[-1]}, y, train=True, mutable=["batch_stats"])[0]
    dense = ops.Dense((3, 2, 4), bias_init=jax.nn.initializers.normal(), param_dtype="float64")
    params.append(dense.init(jax.random.key(2), y)["params"])

    def loss(params, x):
        for block, own in zip(blocks, params):
            x, _ = block.apply({"params": own}, x, train=True, mutable=["batch_stats"])
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        qkv = dense.apply({"params": params[-1]}, tokens)
        query, key, value = (qkv[:, :, i] for i in range(3))
        out = ops.dot_product_attention(query, key, value, scale=0.5)
        return jnp.sin(out).mean() + jnp.square(x).mean(), x

    def step(sharding):
        @jax.jit
        @ops.target_platform(platform)
        @ops.sharded_volumes(sharding)
        def run(params, x):
            (value, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
            return value, y, grads, ops.global_norm(grads)

        return run

    expected = step(None)(params, x)
    given = jax.device_put(x, NamedSharding(mesh, sharding.volume))
    found = step(sharding)(params, given)
    assert found[1].sharding.shard_shape(found[1].shape)[1] == found[1].shape[1] // depth
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    """
)


@pytest.mark.parametrize(
    ("platform", "batch", "depth"),
    [
        ("cpu", 2, 4),
        pytest.param("cpu", 2, 1, marks=pytest.mark.slow),
        pytest.param("tpu", 1, 2, marks=pytest.mark.slow),
        pytest.param("tpu", 2, 4, marks=pytest.mark.slow),
        # Platforms without forms of their own.
        pytest.param("gpu", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_shared_volumes_give_the_same_numbers(platform, batch, depth):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, platform, str(batch), str(depth)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0, result.stderr
