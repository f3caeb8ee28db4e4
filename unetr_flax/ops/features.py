"""Features that need not be arrays yet: results of norms, deconvolutions and concatenations.

What follows them is a convolution, which can often do without the arrays.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from unetr_flax.ops.norm.api import normalize
from unetr_flax.ops.reductions import moments
from unetr_flax.ops.upsample.api import upsample


@flax.struct.dataclass
class DeferredNorm:
    """A norm and its LeakyReLU, not computed yet; see `normalize`.

    Attributes:
      x: [N, *spatial, C].
      moments: its mean and variance, [1, C] each, or [N, C] if per sample.
      scale: [C].
      bias: [C].
      epsilon: added to the variance.
      per_sample: whether mean and variance are those of each sample.
      negative_slope: of the LeakyReLU.
      dtype: of the array.
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
        """Of the array."""
        return self.x.shape

    def array(self) -> jax.Array:
        """[N, *spatial, C]."""
        options = (self.epsilon, self.per_sample, self.negative_slope, self.moments)
        return normalize(self.x, self.scale, self.bias, *options)[0].astype(self.dtype)


def deferred_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    per_sample: bool,
    negative_slope: float,
    dtype: DTypeLike,
) -> DeferredNorm:
    """A norm of which only the moments are computed."""
    # The result's gradient is that of its moments too.
    found = moments(lax.stop_gradient(x), per_sample)
    return DeferredNorm(x, found, scale, bias, epsilon, per_sample, negative_slope, dtype)


@flax.struct.dataclass
class DeferredUpsample:
    """A deconvolution whose kernel is its stride, not computed yet.

    Attributes:
      x: [N, *spatial, I]; not deferred where lowering begins.
      kernel: [*strides, I, O], not mirrored: out[2i + a] = x[i] kernel[a].
      bias: [O], or None.
      precision: of the product.
    """

    x: jax.Array | DeferredNorm
    kernel: jax.Array
    bias: jax.Array | None
    precision: lax.PrecisionLike = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        *strides, _, features = self.kernel.shape
        size = (s * k for s, k in zip(self.x.shape[1:-1], strides, strict=True))
        return self.x.shape[0], *size, features

    def array(self) -> jax.Array:
        """[N, *(spatial * strides), O]."""
        y = upsample(self.x, self.kernel, self.precision, None)
        return y if self.bias is None else y + self.bias


Part = jax.Array | DeferredNorm | DeferredUpsample

# The channels of all parts, one after the other.
Features = Part | tuple[Part, ...]


def parts(features: Features) -> tuple[Part, ...]:
    """What the features are joined of."""
    return features if isinstance(features, tuple) else (features,)


def normalized(features: Features) -> Features:
    """The same with norms computed."""
    if isinstance(features, tuple):
        return tuple(normalized(part) for part in features)
    if isinstance(features, DeferredUpsample):
        return features.replace(x=normalized(features.x))
    return features.array() if isinstance(features, DeferredNorm) else features


def rank(features: Features) -> int:
    """The number of spatial axes."""
    return len(parts(features)[0].shape) - 2


def channels(features: Features) -> int:
    """The number of channels."""
    return sum(part.shape[-1] for part in parts(features))


def joined(features: Features) -> jax.Array:
    """The array [N, *spatial, C]."""
    arrays = [p if isinstance(p, jax.Array) else p.array() for p in parts(normalized(features))]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)
