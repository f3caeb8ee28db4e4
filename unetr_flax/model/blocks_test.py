import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import ops
from unetr_flax.model.blocks import Conv3DBlock, Deconv3DBlock, UNetBlock, torch_uniform
from unetr_flax.model.decoder_spec import BlockStyle


@pytest.mark.parametrize("spatial", [(6,), (4, 6), (2, 4, 6)])
def test_blocks_take_any_number_of_axes(spatial):
    x = jnp.ones((2, *spatial, 3))
    y, _ = Conv3DBlock(5).init_with_output(jax.random.key(0), x)
    assert y.shape == (2, *spatial, 5)
    strides = (1, 2, 2)[: len(spatial)]
    y, variables = Deconv3DBlock(5, strides).init_with_output(jax.random.key(0), x)
    assert y.shape == (2, *(n * s for n, s in zip(spatial, strides, strict=True)), 5)
    assert variables["params"]["deconv"]["kernel"].shape == (*strides, 3, 5)


class TwoBlocks(nn.Module):
    """Two convolution blocks, the second of which starts from the norm of the first."""

    remat: bool
    lowering: ops.Lowering = "auto"

    @nn.compact
    def __call__(self, x, *, train=False):
        """Computes [B, *spatial, C] -> [B, *spatial, 5]."""
        for features in (6, 5):
            block = Conv3DBlock(
                features, remat=self.remat, param_dtype=jnp.float64, lowering=self.lowering
            )
            x = block(x, train=train)
            assert isinstance(x, jax.Array)
        return x


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_recomputed_norms_are_the_same_norms_and_not_kept(lowering):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4, 3))) * 2 + 1
        plain, again = (TwoBlocks(remat, lowering) for remat in (False, True))
        variables = plain.init(jax.random.key(1), x)

        def everything(block):
            @jax.jit
            def gradients(params, x):
                def run(params, x):
                    given = {**variables, "params": params}
                    return block.apply(given, x, train=True, mutable=["batch_stats"])

                y, vjp, updated = jax.vjp(run, params, x, has_aux=True)
                return y, updated, vjp(jnp.sin(3 * y))

            return gradients(variables["params"], x)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
            everything(plain),
            everything(again),
        )
        # Evaluation has no backward pass and so no recomputation.
        np.testing.assert_array_equal(again.apply(variables, x), plain.apply(variables, x))


def stored_volumes(block, x):
    """Counts the different volumes that a block stores for its backward pass."""
    variables = block.init(jax.random.key(0), x)

    def run(params, x):
        given = {**variables, "params": params}
        return block.apply(given, x, train=True, mutable=["batch_stats"])[0]

    leaves = jax.tree.leaves(jax.vjp(run, variables["params"], x)[1])
    volumes = [leaf for leaf in leaves if leaf.shape[:-1] == x.shape[:-1]]
    return len({np.asarray(volume).tobytes() for volume in volumes})


def test_recomputation_does_not_keep_the_norm_between_two_convolutions():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 4, 3)))
        again, plain = (stored_volumes(TwoBlocks(remat), x) for remat in (True, False))
        assert again == plain - 1


@pytest.mark.parametrize("block", ["basic", "residual"])
@pytest.mark.parametrize(("norm", "groups"), [("batch", None), ("instance", None), ("group", 2)])
def test_unet_blocks_of_every_style_take_the_plain_lowering(block, norm, groups):
    style = BlockStyle(block, norm, groups, norm_affine=True)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 3)))
        found = {}
        for lowering in ("auto", "xla"):
            module = UNetBlock(4, style, param_dtype=jnp.float64, lowering=lowering)
            variables = module.init(jax.random.key(1), x)
            found[lowering], _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(found["auto"], found["xla"], rtol=1e-10, atol=1e-12)


@jax.numpy_dtype_promotion("standard")
def test_half_precision_has_gradients_by_an_image_that_is_the_shortcut():
    style = BlockStyle(block="residual", norm="instance", norm_groups=None, norm_affine=False)
    image, grad = np.random.default_rng(0).standard_normal((2, 1, 4, 5, 6, 4), np.float32)
    variables = UNetBlock(4, style).init(jax.random.key(1), image)

    def gradient(**fields):
        block = UNetBlock(4, style, **fields)

        def weighted(image):
            return (block.apply(variables, image).astype(jnp.float32) * grad).sum()

        return jax.jit(jax.grad(weighted))(image)

    exact = gradient()
    for remat in (False, True):
        found = gradient(dtype=jnp.bfloat16, remat=remat)
        assert found.dtype == jnp.float32
        # A LeakyReLU that rounding switches changes more than rounding does.
        assert np.linalg.norm(found - exact) <= 0.2 * np.linalg.norm(exact)


def test_batch_sharded_over_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unetr_flax.model import blocks
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (4, 4, 12, 5, 3))
module = blocks.Deconv3DBlock(4, (2, 1, 2), param_dtype=x.dtype)
variables = module.init(jax.random.key(1), x)
def loss(params, x):
    y, updated = module.apply(
        {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
    )
    return (y ** 2).mean(), updated
step = jax.jit(jax.value_and_grad(loss, has_aux=True))
alone = step(variables["params"], x)
sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
together = step(variables["params"], sharded)
assert "all-gather" not in step.lower(variables["params"], sharded).compile().as_text()
for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert len(a.sharding.device_set) == 2
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )


def test_initial_weights_are_those_of_a_draw_of_their_shape():
    key, shape = jax.random.key(1), (3, 3, 3, 2, 5)
    expected = jax.random.uniform(key, shape, minval=-0.25, maxval=0.25)
    np.testing.assert_array_equal(torch_uniform(16)(key, shape), expected)
