"""Features that need not be arrays yet: results of deconvolutions and of concatenations.

What follows them is a convolution, which can often do without the arrays.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from unetr_flax.ops.upsample import upsample


@flax.struct.dataclass
class Upsampled:
    """A deconvolution whose kernel is its stride, not computed yet.

    Attributes:
      x: [N, *spatial, I].
      kernel: [*strides, I, O], not mirrored: out[2i + a] = x[i] kernel[a].
      bias: [O], or None.
      precision: of the product.
    """

    x: jax.Array
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


# The channels of all parts, one after the other.
Features = jax.Array | Upsampled | tuple[jax.Array | Upsampled, ...]


def parts(features: Features) -> tuple[jax.Array | Upsampled, ...]:
    """What the features are joined of."""
    return features if isinstance(features, tuple) else (features,)


def rank(features: Features) -> int:
    """The number of spatial axes."""
    return len(parts(features)[0].shape) - 2


def channels(features: Features) -> int:
    """The number of channels."""
    return sum(part.shape[-1] for part in parts(features))


def joined(features: Features) -> jax.Array:
    """The array [N, *spatial, C]."""
    arrays = [p.array() if isinstance(p, Upsampled) else p for p in parts(features)]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)
