"""Scaled dot-product attention on CPU, in blocks whose weights stay in the processor's cache.

The weights of all queries are written to memory and read again several times if they are computed
at once. Here a block of queries has its result before the next one begins, and the backward pass
computes the weights again (Rabe & Staats 2021; Dao et al. 2022, FlashAttention, algorithm 4), so
none are stored for it. Heads are computed one by one, since XLA's products are faster with fewer
batch dimensions; samples are not, since they may be split over devices.

Shapes: H heads, B batch, N queries or keys, D head size, S blocks, n queries of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.attention import xla
from unetr_flax.ops.derivatives import custom_vjp
from unetr_flax.ops.dtypes import at_least_float32
from unetr_flax.ops.platform import by_platform, may_run_on

# With fewer keys all weights of a head fit the cache anyway.
MIN_KEYS = 512
# Weights of a block; processors have a few megabytes of cache for each core.
BLOCK_BYTES = 3 << 20


def is_available(query: jax.Array, key: jax.Array) -> bool:
    """Tells whether blocks pay for [B, N, H, D], in programs that may run on CPU."""
    wide = query.dtype == at_least_float32(query.dtype)
    return wide and key.shape[1] >= MIN_KEYS and may_run_on("cpu")


# The gradient chooses its platform separately: differentiating through the choice would store the
# weights, which other platforms compute again.
@functools.partial(custom_vjp, nondiff_argnums=(3,))
def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
) -> jax.Array:
    """Computes softmax(query key^T scale) value, on other platforms as `attention.xla`."""
    return _forward(query, key, value, scale)[0]


def _forward(query, key, value, scale):
    out, log_sums = by_platform(
        query,
        key,
        value,
        cpu=functools.partial(_attend, scale=scale),
        default=functools.partial(_attend_at_once, scale=scale),
    )
    return out, (query, key, value, out, log_sums)


def _backward(scale, residuals, grad):
    return by_platform(
        *residuals,
        grad,
        cpu=functools.partial(_gradients, scale=scale),
        default=functools.partial(_gradients_at_once, scale=scale),
    )


dot_product_attention.defvjp(_forward, _backward)


def _attend(query, key, value, *, scale):
    """Returns the result, and the logarithms of the softmax's denominators, [H, B, N, 1]."""

    def head(operands):
        query, key, value = operands
        transposed_key = jnp.swapaxes(key, 1, 2)

        def block(query):
            energy = query @ transposed_key  # [B, n, N]
            largest = energy.max(axis=-1, keepdims=True)
            weights = jnp.exp(energy - largest)
            total = weights.sum(axis=-1, keepdims=True)
            return (weights @ value) / total, jnp.log(total) + largest

        out, log_sums = lax.map(block, _split(query * scale, key.shape[1]))
        return _merge(out, query), _merge(log_sums, query)

    out, log_sums = lax.map(head, tuple(map(_heads_first, (query, key, value))))
    return _heads_third(out), log_sums


def _gradients(query, key, value, out, log_sums, grad, *, scale):
    def head(operands):
        query, key, value, out, log_sums, grad = operands
        transposed_key, transposed_value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
        # What each query's weights lose together, since their sum stays 1.
        loss = (out * grad).sum(axis=-1, keepdims=True)

        def block(sums, operands):
            key_grad, value_grad = sums
            query, log_sums, grad, loss = operands
            weights = jnp.exp(query @ transposed_key - log_sums)  # [B, n, N]
            energy_grad = weights * (grad @ transposed_value - loss)
            sums = (
                key_grad + jnp.swapaxes(energy_grad, 1, 2) @ query,
                value_grad + jnp.swapaxes(weights, 1, 2) @ grad,
            )
            return sums, energy_grad @ key

        blocks = tuple(_split(x, key.shape[1]) for x in (query * scale, log_sums, grad, loss))
        zeros = (jnp.zeros_like(key), jnp.zeros_like(value))
        (key_grad, value_grad), query_grad = lax.scan(block, zeros, blocks)
        return _merge(query_grad, query) * scale, key_grad, value_grad

    operands = (*map(_heads_first, (query, key, value, out)), log_sums, _heads_first(grad))
    return tuple(map(_heads_third, lax.map(head, operands)))


def _attend_at_once(query, key, value, *, scale):
    out = xla.dot_product_attention(query, key, value, scale=scale)
    batch, queries, heads, _ = query.shape
    return out, jnp.zeros((heads, batch, queries, 1), query.dtype)  # which nothing reads


def _gradients_at_once(query, key, value, out, log_sums, grad, *, scale):
    attend = functools.partial(xla.dot_product_attention, scale=scale)
    return jax.vjp(attend, query, key, value)[1](grad)


def _split(x: jax.Array, keys: int) -> jax.Array:
    """Splits queries into blocks, [B, N, D] -> [S, B, n, D], with zeros after the last."""
    batch, queries, size = x.shape
    # An exported program may leave the batch open.
    samples = batch if isinstance(batch, int) else 1
    # An empty batch has one block, too.
    blocks = max(1, math.ceil(samples * queries * keys * x.dtype.itemsize / BLOCK_BYTES))
    length = math.ceil(queries / blocks)
    padded = jnp.pad(x, ((0, 0), (0, blocks * length - queries), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, blocks, length, size), 1, 0)


def _merge(blocks: jax.Array, query: jax.Array) -> jax.Array:
    """Inverts `_split`, [S, B, n, D] -> [B, N, D], for as many queries as there are in `query`."""
    number, batch, length, size = blocks.shape
    whole = jnp.moveaxis(blocks, 0, 1).reshape(batch, number * length, size)
    return whole[:, : query.shape[1]]


def _heads_first(x: jax.Array) -> jax.Array:
    """Transposes [B, N, H, D] -> [H, B, N, D]."""
    return jnp.moveaxis(x, 2, 0)


def _heads_third(x: jax.Array) -> jax.Array:
    """Transposes [H, B, N, D] -> [B, N, H, D]."""
    return jnp.moveaxis(x, 0, 2)
