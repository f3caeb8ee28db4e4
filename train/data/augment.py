"""Augmentation on the device: random changes of each sample of a batch, with a key of its own.

A change is a function `(key, image, label) -> (image, label)` of one sample, image [*spatial, C]
and label [*spatial]. Changes are part of the compiled training step, and a sample is determined by
its key alone. Rotation and zoom are not among them: they are one resampling of the whole volume
when the crop is cut out, see `train.data.crops`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.data import intensity
from train.data.crops import (
    Crop,
    default_crop,
    nnunet_crop,
    plain_crop,
    strong_crop,
)
from train.step import Augment

Change = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# (key, image) -> image
IntensityChange = Callable[[jax.Array, jax.Array], jax.Array]


def sometimes(probability: float, change: IntensityChange) -> Change:
    """Makes a change of intensities that happens with a probability; labels stay as they are."""

    def apply(key, image, label):
        drawn, key = jax.random.split(key)
        happens = jax.random.uniform(drawn) < probability
        return jnp.where(happens, change(key, image), image), label

    return apply


def random_flips(axes: Sequence[int], probability: float) -> Change:
    """Makes a change that flips image and label along each of the axes with a probability."""

    def apply(key, image, label):
        happens = jax.random.uniform(key, (len(axes),)) < probability
        for axis, flipped in zip(axes, happens, strict=True):
            image, label = (jnp.where(flipped, jnp.flip(x, axis), x) for x in (image, label))
        return image, label

    return apply


def random_rotate90(probability: float) -> Change:
    """Makes a change that turns axes 0 and 1, of one size, by 90, 180 or 270 degrees.

    This is MONAI's `RandRotate90(prob=probability, max_k=3)`.
    """

    def apply(key, image, label):
        drawn, key = jax.random.split(key)
        happens = jax.random.uniform(drawn) < probability
        turns = jnp.where(happens, jax.random.randint(key, (), 1, 4), 0)
        which = [turns == k for k in range(4)]
        image, label = (
            jnp.select(which, [jnp.rot90(x, k) for k in range(4)]) for x in (image, label)
        )
        return image, label

    return apply


def random_scale(low: float, high: float) -> IntensityChange:
    """Makes a change of brightness by a factor from a range."""
    return lambda key, image: intensity.scale_and_shift(image, _draw(key, low, high))


def random_shift(amount: float) -> IntensityChange:
    """Makes a change that adds a number that is at most `amount` from 0."""
    return lambda key, image: intensity.scale_and_shift(image, 1.0, _draw(key, -amount, amount))


def random_contrast(low: float, high: float) -> IntensityChange:
    """Makes a change of contrast by a factor from a range."""
    return lambda key, image: intensity.change_contrast(image, _draw(key, low, high))


def random_gamma(low: float, high: float, *, inverted: bool = False) -> IntensityChange:
    """Makes a change by a power that is below 1 as often as above it."""

    def apply(key, image):
        side, key = jax.random.split(key)
        below = jax.random.bernoulli(side)
        gamma = jnp.where(below, _draw(key, low, 1.0), _draw(key, 1.0, high))
        return intensity.change_gamma(image, gamma, inverted=inverted)

    return apply


def random_noise(max_deviation: float) -> IntensityChange:
    """Makes a change that adds Gaussian noise of at most a standard deviation."""

    def apply(key, image):
        drawn, key = jax.random.split(key)
        return intensity.add_noise(key, image, _draw(drawn, 0.0, max_deviation))

    return apply


def random_blur(low: float, high: float) -> IntensityChange:
    """Makes a change that blurs with a standard deviation from a range, in voxels."""
    return lambda key, image: intensity.blur(image, _draw(key, low, high))


def random_low_resolution(low: float, high: float) -> IntensityChange:
    """Makes a change that lowers the resolution to a share from a range."""
    return lambda key, image: intensity.lower_resolution(image, _draw(key, low, high))


def nnunet_intensities() -> list[Change]:
    """Lists nnU-Net's changes of intensities, in its order and with its numbers.

    They are those of Isensee et al. 2021, supplementary note 2, and of nnU-Net's code. Numbers are
    drawn once for all channels.
    """
    return [
        sometimes(0.1, random_noise(0.1)),
        sometimes(0.2, random_blur(0.5, 1.0)),
        sometimes(0.15, random_scale(0.75, 1.25)),
        sometimes(0.15, random_contrast(0.75, 1.25)),
        sometimes(0.25, random_low_resolution(0.5, 1.0)),
        sometimes(0.1, random_gamma(0.7, 1.5, inverted=True)),
        sometimes(0.3, random_gamma(0.7, 1.5)),
    ]


def scale_and_shift_intensities(scale: float, shift: float, amount: float = 0.1) -> list[Change]:
    """Lists the changes of MONAI's recipes.

    Args:
      scale: probability of a factor that is at most `amount` from 1.
      shift: probability of an offset that is at most `amount` from 0.
      amount: the largest change; images are normalized.
    """
    changes = [(scale, random_scale(1 - amount, 1 + amount)), (shift, random_shift(amount))]
    return [sometimes(probability, change) for probability, change in changes if probability]


def default_intensities(amount: float = 0.1, max_deviation: float = 0.05) -> list[Change]:
    """Lists a factor, an offset and Gaussian noise, which every sample gets.

    Args:
      amount: the largest change by factor and offset.
      max_deviation: the largest standard deviation of the noise.
    """
    noise = sometimes(1.0, random_noise(max_deviation))
    return [*scale_and_shift_intensities(1.0, 1.0, amount), noise]


class Augmentation(NamedTuple):
    """Everything random about a sample but the flips, which have options of their own.

    Attributes:
      crop: makes the crops of a size that the loader cuts out.
      changes: what happens to the crops on the device.
    """

    crop: Callable[[Sequence[int]], Crop]
    changes: Sequence[Change] = ()


# The values of --augmentation.
AUGMENTATIONS = {
    "default": Augmentation(default_crop, default_intensities()),
    "none": Augmentation(plain_crop),
    "nnunet": Augmentation(nnunet_crop, nnunet_intensities()),
    "strong": Augmentation(strong_crop, default_intensities(0.2, 0.1)),
    # UNETR's code for BTCV: each changes one sample in ten.
    "unetr_btcv": Augmentation(plain_crop, scale_and_shift_intensities(0.1, 0.1)),
    # MONAI's tutorial of UNETR for BTCV: a shift of every second sample.
    "monai_btcv": Augmentation(plain_crop, scale_and_shift_intensities(0.0, 0.5)),
    # MONAI's tutorial for BraTS: both change every sample.
    "monai_brats": Augmentation(plain_crop, scale_and_shift_intensities(1.0, 1.0)),
}


def make_augment(
    changes: Sequence[Change],
    *,
    flips: Sequence[int] = (),
    flip_probability: float = 0.5,
    rotate90_probability: float = 0.0,
) -> Augment | None:
    """Makes the augmentation of a batch.

    Args:
      changes: what happens to each sample, in this order.
      flips: axes along which samples are flipped, after these changes.
      flip_probability: probability of a flip along each of the axes.
      rotate90_probability: probability of a rotation by 90, 180 or 270 degrees of axes 0 and 1.

    Returns:
      (keys [B], images [B, *spatial, C], labels [B, *spatial]) -> images and labels; None if
      nothing would change.
    """
    changes = list(changes)
    if flips and flip_probability:
        changes.append(random_flips(tuple(flips), flip_probability))
    if rotate90_probability:
        changes.append(random_rotate90(rotate90_probability))
    if not changes:
        return None

    def augment(key, image, label):
        for change, change_key in zip(changes, jax.random.split(key, len(changes)), strict=True):
            image, label = change(change_key, image, label)
        return image, label

    return jax.vmap(augment)


def _draw(key: jax.Array, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, minval=low, maxval=high)
