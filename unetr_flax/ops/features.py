"""Arrays that remember the operation that made them.

The convolution after a norm, a deconvolution or a concatenation can often compute less, or store
less for the backward pass, if it starts from that operation's operands. So the results of these
operations are ordinary arrays, and this module records the source of each for as long as the array
lives: `conv_operands`, `norm_of` and `recompute_sources` look the source up. The compiler removes
an array that nothing reads. An array that has lost its source, for example by passing through a
function of `jax.jit`, is used as it is, and the numbers are the same.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.dtypes import add_bias
from unetr_flax.ops.norm.tuned import normalize
from unetr_flax.ops.upsample.api import upsample


class DeferredNorm(flax.struct.PyTreeNode):
    """A norm and its LeakyReLU, not computed yet; see `norm.tuned.normalize`.

    Attributes:
      x: [N, *spatial, C].
      moments: mean and variance of x, [1, C] each, or [N, C] if per sample.
      scale: [C].
      bias: [C].
      epsilon: number added to the variance.
      per_sample: whether mean and variance are those of each sample.
      negative_slope: slope of the LeakyReLU.
      dtype: dtype of the result.
    """

    x: jax.Array
    moments: tuple[jax.Array, jax.Array]
    scale: jax.Array
    bias: jax.Array
    epsilon: float = flax.struct.field(pytree_node=False)
    per_sample: bool = flax.struct.field(pytree_node=False)
    negative_slope: float = flax.struct.field(pytree_node=False)
    dtype: DTypeLike = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.x.shape

    def array(self) -> jax.Array:
        """Computes the result, [N, *spatial, C]."""
        options = (self.epsilon, self.per_sample, self.negative_slope)
        return normalize(self.x, self.scale, self.bias, *options, self.moments).astype(self.dtype)


Input = TypeVar("Input", bound=jax.Array | DeferredNorm, covariant=True)


class DeferredUpsample(flax.struct.PyTreeNode, Generic[Input]):
    """A deconvolution whose kernel is its stride, not computed yet.

    Attributes:
      x: [N, *spatial, I]; itself deferred only among the sources of a recomputation.
      kernel: [*strides, I, O], not mirrored: out[2i + a] = x[i] kernel[a].
      bias: [O], or None.
      precision: precision of the products.
    """

    x: Input
    kernel: jax.Array
    bias: jax.Array | None
    precision: lax.PrecisionLike = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        *strides, _, features = self.kernel.shape
        size = (s * k for s, k in zip(self.x.shape[1:-1], strides, strict=True))
        return self.x.shape[0], *size, features

    def array(self) -> jax.Array:
        """Computes the result, [N, *(spatial * strides), O]."""
        y = upsample(materialized(self.x), self.kernel, self.precision, None)
        return add_bias(y, self.bias)


class Concatenation(NamedTuple):
    """A concatenation of arrays [N, *spatial, C_i] along the channels."""

    parts: tuple[jax.Array, ...]


Part = jax.Array | DeferredNorm | DeferredUpsample[jax.Array]
# The channels of all parts, one after the other.
Features = Part | tuple[Part, ...]
# The operands of a recomputation, which may be deconvolutions of deferred norms.
Source = jax.Array | DeferredNorm | DeferredUpsample[jax.Array | DeferredNorm]
Sources = Source | tuple[Source, ...]


class _Memory(NamedTuple):
    array: weakref.ref
    source: DeferredNorm | DeferredUpsample[Any] | Concatenation
    # Whether the array itself is in memory for the backward pass.
    stored: bool


_MEMORIES: dict[int, _Memory] = {}


def remember(
    array: jax.Array,
    source: DeferredNorm | DeferredUpsample[Any] | Concatenation,
    *,
    stored: bool = True,
) -> jax.Array:
    """Records the source of an array, and returns the array.

    Args:
      array: result of the operation.
      source: the operation and its operands.
      stored: False if the backward pass computes the array again from its source, so that a
        convolution of the array should start from the source as well.
    """
    key = id(array)
    _MEMORIES[key] = _Memory(weakref.ref(array, lambda _: _MEMORIES.pop(key, None)), source, stored)
    return array


def concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    """Concatenates [N, *spatial, C_i] along the channels."""
    return remember(jnp.concatenate(parts, axis=-1), Concatenation(tuple(parts)))


def norm_of(x: jax.Array) -> DeferredNorm | None:
    """Returns the norm that made an array, if one did."""
    memory = _memory(x)
    return memory.source if memory and isinstance(memory.source, DeferredNorm) else None


def conv_operands(x: jax.Array) -> Features:
    """Returns the parts that a convolution of an array computes with.

    The last part is deferred if it is the result of a deconvolution, which a convolution can
    compute on the coarse grid; norms are deferred only where their results are not stored.
    """
    *own, last = _parts(x)
    found = (*map(_unstored_norm, own), _upsample_of(last) or _unstored_norm(last))
    return found[0] if len(found) == 1 else found


def recompute_sources(x: jax.Array) -> Sources:
    """Returns the operands from which a recomputation in the backward pass can make an array."""
    *own, last = _parts(x)
    up = _upsample_of(last)
    found = (
        *(norm_of(part) or part for part in own),
        up.replace(x=norm_of(up.x) or up.x) if up else norm_of(last) or last,
    )
    return found[0] if len(found) == 1 else found


def recomputed(sources: Sources) -> jax.Array:
    """Computes an array again from its `recompute_sources`."""
    if isinstance(sources, tuple):
        return concatenate([recomputed(part) for part in sources])
    if isinstance(sources, DeferredNorm):
        return remember(sources.array(), sources, stored=False)
    if isinstance(sources, DeferredUpsample):
        up = sources.replace(x=materialized(sources.x))
        return remember(up.array(), up)
    return sources


def materialized(part: jax.Array | DeferredNorm) -> jax.Array:
    """Returns a part as an array."""
    return part.array() if isinstance(part, DeferredNorm) else part


def without_moment_grads(tree: Any) -> Any:
    """Replaces the gradients of norms' moments, which are zero, by None.

    A norm's gradient with respect to its input includes the one through the moments. JAX would
    differentiate the moments as well if their gradients were arrays of zeros.
    """
    return jax.tree.map(
        lambda part: part.replace(moments=None) if isinstance(part, DeferredNorm) else part,
        tree,
        is_leaf=lambda part: isinstance(part, DeferredNorm),
    )


def parts(features: Features) -> tuple[Part, ...]:
    """Returns the parts of features, also if there is only one."""
    return features if isinstance(features, tuple) else (features,)


def concatenated(features: Features) -> jax.Array:
    """Computes all channels as one array, [N, *spatial, C]."""
    arrays = [part if isinstance(part, jax.Array) else part.array() for part in parts(features)]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


def _memory(x: jax.Array) -> _Memory | None:
    memory = _MEMORIES.get(id(x))
    return memory if memory and memory.array() is x else None


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    memory = _memory(x)
    return memory.source.parts if memory and isinstance(memory.source, Concatenation) else (x,)


def _upsample_of(x: jax.Array) -> DeferredUpsample[jax.Array] | None:
    memory = _memory(x)
    return memory.source if memory and isinstance(memory.source, DeferredUpsample) else None


def _unstored_norm(x: jax.Array) -> jax.Array | DeferredNorm:
    memory = _memory(x)
    if memory and isinstance(memory.source, DeferredNorm) and not memory.stored:
        return memory.source
    return x
