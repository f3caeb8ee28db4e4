"""A model's many small leaves as one vector.

UNETR has hundreds of biases, scales and shifts, which hardly count among its numbers. An optimiser
that goes through them one by one is most of a training step's operations by count, and all of them
have to be compiled and started.
"""

from typing import Any

import jax
import jax.numpy as jnp

# Leaves of up to this many numbers are small.
SMALL = 2**14


def pack(tree: Any) -> dict[str, Any]:
    """{"arrays": the tree without its small leaves, "vector": those, one after the other, [M]}.

    Small are biases, scales and the like; kernels, which optimisers may treat otherwise, never are.
    """
    small = [leaf.reshape(-1) for path, leaf in _leaves(tree) if _is_small(path, leaf)]
    arrays = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if _is_small(path, leaf) else leaf, tree
    )
    return {"arrays": arrays, "vector": jnp.concatenate(small) if small else jnp.zeros(0)}


def unpack(packed: dict[str, Any], like: Any) -> Any:
    """The inverse of `pack`: a tree of the structure and shapes of `like`."""
    arrays = iter(jax.tree.leaves(packed["arrays"]))
    leaves, start = [], 0
    for path, leaf in _leaves(like):
        if _is_small(path, leaf):
            leaves.append(packed["vector"][start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        else:
            leaves.append(next(arrays))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _is_small(path, leaf):
    return leaf.size <= SMALL and path[-1].key != "kernel"
