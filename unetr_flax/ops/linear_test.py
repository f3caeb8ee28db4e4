import jax
from jax import lax

from unetr_flax import ops
from unetr_flax.ops.testing import assert_close, random


def test_linear_map_and_its_gradients_are_those_of_jax():
    with jax.enable_x64(True):
        x, kernel = random(0, (2, 5, 3, 4)), random(1, (3, 4, 2, 6))
        for dimensions in ((((2, 3), (0, 1)), ((), ())), (((3,), (1,)), ((0,), (2,)))):
            y, vjp = jax.vjp(lambda a, b, d=dimensions: ops.dot_general(a, b, d), x, kernel)
            theirs, vjp_theirs = jax.vjp(
                lambda a, b, d=dimensions: lax.dot_general(a, b, d), x, kernel
            )
            for a, b in zip((y, *vjp(y)), (theirs, *vjp_theirs(y)), strict=True):
                assert_close(a, b)


def test_plain_lowering_is_the_product_of_jax():
    with jax.enable_x64(True):
        x, kernel = random(0, (2, 5, 3, 4)), random(1, (3, 4, 2, 6))
        dimensions = ((2, 3), (0, 1)), ((), ())
        ours = jax.make_jaxpr(lambda *a: ops.dot_general(*a, dimensions, lowering="xla"))
        theirs = jax.make_jaxpr(lambda *a: lax.dot_general(*a, dimensions))
        assert str(ours(x, kernel)) == str(theirs(x, kernel))
