"""Changes of intensities, as functions of one image and of numbers that are drawn elsewhere.

Images are [*spatial, C] and normalized; all functions are traced by JAX. `train.data.augment` draws
the numbers.
"""

import jax
import jax.numpy as jnp

# Half width of a Gaussian kernel in standard deviations, as in `scipy.ndimage.gaussian_filter`.
TRUNCATE = 4.0


def scale_and_shift(
    image: jax.Array, factor: jax.Array | float, offset: jax.Array | float = 0.0
) -> jax.Array:
    """Multiplies by a factor and adds an offset.

    The factor alone is nnU-Net's change of brightness (Isensee et al. 2021, supplementary note 2);
    both are MONAI's `ScaleIntensity(factor=...)` and `ShiftIntensity`.
    """
    return image * factor + offset


def change_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiplies the distance from each channel's mean, then clips to the channel's old range.

    This is the change of contrast of nnU-Net (Isensee et al. 2021, supplementary note 2).
    """
    mean, low, high = _of_channels(image)
    return jnp.clip(mean + (image - mean) * factor, low, high)


def change_gamma(
    image: jax.Array, gamma: jax.Array | float, *, inverted: bool = False
) -> jax.Array:
    """Raises each channel, scaled to [0, 1], to a power; mean and deviation stay as they were.

    This is the gamma augmentation of nnU-Net (Isensee et al. 2021, supplementary note 2).

    Args:
      image: the image.
      gamma: the power.
      inverted: whether bright and dark are exchanged before and after.
    """
    image = -image if inverted else image
    mean, low, high = _of_channels(image)
    axes = tuple(range(image.ndim - 1))
    deviation = image.std(axes)
    tiny = jnp.finfo(image.dtype).tiny
    # A constant channel has no range; it stays as it is.
    changed = ((image - low) / jnp.maximum(high - low, tiny)) ** gamma
    centered = changed - changed.mean(axes)
    changed = mean + centered * deviation / jnp.maximum(changed.std(axes), tiny)
    changed = jnp.where(high > low, changed, image)
    return -changed if inverted else changed


def blur(image: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Filters with a Gaussian of a standard deviation in voxels, mirrored at the edges.

    The result is that of `scipy.ndimage.gaussian_filter`, for a kernel that is not wider than the
    image.
    """
    for axis in range(image.ndim - 1):
        # Along an axis, the filter is a product with a small matrix, whatever sigma is.
        kernel = _gaussian_matrix(image.shape[axis], sigma).astype(image.dtype)
        image = jnp.moveaxis(jnp.tensordot(kernel, image, (1, axis)), 0, axis)
    return image


def lower_resolution(image: jax.Array, zoom: jax.Array | float) -> jax.Array:
    """Samples the nearest voxels on a coarser grid, then interpolates linearly back.

    This simulates a lower resolution as nnU-Net does (Isensee et al. 2021, supplementary note 2),
    which interpolates back with cubic splines.

    Args:
      image: the image.
      zoom: voxels per axis of the coarse grid, relative to the image, in (0, 1].
    """
    for axis in range(image.ndim - 1):
        size = image.shape[axis]
        coarse = jnp.maximum(jnp.round(size * zoom), 1)
        place = (jnp.arange(size, dtype=jnp.float32) + 0.5) * coarse / size - 0.5
        place = jnp.clip(place, 0, coarse - 1)
        below = jnp.floor(place)
        shape = [size if i == axis else 1 for i in range(image.ndim)]
        share = (place - below).reshape(shape).astype(image.dtype)
        sources = (
            jnp.clip(jnp.floor((index + 0.5) * size / coarse), 0, size - 1).astype(jnp.int32)
            for index in (below, jnp.minimum(below + 1, coarse - 1))
        )
        first, second = (jnp.take(image, source, axis=axis) for source in sources)
        image = first + (second - first) * share
    return image


def add_noise(key: jax.Array, image: jax.Array, deviation: jax.Array | float) -> jax.Array:
    """Adds independent Gaussian noise of a standard deviation to every voxel."""
    return image + deviation * jax.random.normal(key, image.shape, image.dtype)


def _of_channels(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns mean, lowest and highest intensity of each channel."""
    axes = tuple(range(image.ndim - 1))
    return image.mean(axes), image.min(axes), image.max(axes)


def _gaussian_matrix(size: int, sigma: jax.Array | float) -> jax.Array:
    """Returns the matrix of a Gaussian filter along an axis of so many voxels."""
    index = jnp.arange(size, dtype=jnp.float32)

    def weight(distance: jax.Array) -> jax.Array:
        inside = jnp.abs(distance) <= jnp.floor(TRUNCATE * sigma + 0.5)
        return jnp.where(inside, jnp.exp(-0.5 * (distance / sigma) ** 2), 0)

    to, source = index[:, None], index[None, :]
    # Each voxel also lies beyond both edges, as its mirror images.
    mirrored = weight(to + source + 1) + weight(to + source + 1 - 2 * size)
    matrix = weight(to - source) + mirrored
    return matrix / matrix.sum(axis=1, keepdims=True)
