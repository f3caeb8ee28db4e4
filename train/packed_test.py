import jax
import jax.numpy as jnp
import numpy as np

from train.packed import SMALL, pack, unpack

PARAMS = {
    "conv": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.arange(2.0)},
    "embedding": {"position": jnp.arange(float(SMALL + 1))[None]},
    "norm": {"scale": jnp.array([[5.0], [6.0], [7.0]])},
}


def test_small_leaves_are_one_vector_and_come_back():
    packed = pack(PARAMS)
    np.testing.assert_array_equal(packed["vector"], [0, 1, 5, 6, 7])
    assert [leaf.size for leaf in jax.tree.leaves(packed["arrays"])] == [6, SMALL + 1]
    doubled = unpack(jax.tree.map(lambda x: 2 * x, packed), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, doubled, jax.tree.map(lambda x: 2 * x, PARAMS))


def test_kernels_stay_and_keep_their_path():
    kernels = {"a": {"kernel": jnp.ones(1)}, "b": {"kernel": jnp.zeros((2, 2))}}
    packed = pack(kernels)
    assert packed["arrays"].keys() == kernels.keys()
    assert packed["vector"].shape == (0,)
    jax.tree.map(np.testing.assert_array_equal, unpack(packed, kernels), kernels)
