import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from unetr_flax import ops
from unetr_flax.ops.testing import assert_close, random


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("strides", [(2, 1, 2), (2, 1), (2,)])
def test_module_and_its_gradients_are_those_of_flax(strides, lowering):
    with jax.enable_x64(True):
        x = random(0, (2, *(3, 4, 2)[: len(strides)], 5))
        options = {"kernel_size": strides, "strides": strides, "padding": "VALID"}
        module = ops.ConvTranspose(4, **options, param_dtype=jnp.float64, lowering=lowering)
        theirs = nn.ConvTranspose(4, **options, param_dtype=jnp.float64)
        variables = theirs.init(jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: random(leaf.ndim, leaf.shape), variables)
        y, vjp = jax.vjp(jax.jit(module.apply), variables, x)
        y_theirs, vjp_theirs = jax.vjp(theirs.apply, variables, x)
        cotangent = random(3, y.shape)
        assert_close(y, y_theirs)
        jax.tree.map(assert_close, vjp(cotangent), vjp_theirs(cotangent))


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_deconvolution_takes_the_shapes_and_types_of_flax(batch, lowering):
    x = random(0, (*batch, 4, 3), jnp.bfloat16)
    options = {"kernel_size": 2, "strides": 2, "padding": "VALID", "dtype": jnp.bfloat16}
    for result in (None, jnp.float32):
        options.update(use_bias=False, preferred_element_type=result)
        ours = ops.ConvTranspose(4, **options, lowering=lowering)
        theirs = nn.ConvTranspose(4, **options)
        variables = theirs.init(jax.random.key(0), x)
        assert_close(ours.apply(variables, x), theirs.apply(variables, x), 2**-8)
        gradient, _ = jax.grad(lambda *a, m=ours: (m.apply(*a) ** 2).sum(), (0, 1))(variables, x)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3), "strides": (2, 2), "padding": "VALID"},
        {"kernel_size": (2, 2), "strides": (2, 2), "padding": "SAME"},
        {"kernel_size": (2, 2), "strides": None, "padding": "VALID"},
        {"kernel_size": (2, 2), "strides": (2, 2), "padding": "VALID", "transpose_kernel": True},
    ],
)
def test_other_deconvolutions_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        ops.ConvTranspose(4, **options).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
