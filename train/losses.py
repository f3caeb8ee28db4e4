"""Losses of segmentation: cross-entropy, soft Dice, and their sum.

A loss is a function of logits and labels; a new one is such a function and an entry in `LOSSES`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unetr_flax.ops.dtypes import at_least_float32

Loss = Callable[[jax.Array, jax.Array], jax.Array]

# Makes the Dice of a class 1 if neither label nor prediction has the class (MONAI's default).
SMOOTH = 1e-5


def dice_cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, *, include_background: bool = True
) -> jax.Array:
    """Computes soft Dice loss + cross-entropy, both with weight 1.

    UNETR trains with this sum (Hatamizadeh et al. 2022, section 3.2), as do nnU-Net (Isensee et al.
    2021, Methods) and MONAI's `DiceCELoss(softmax=True, to_onehot_y=True)`, whose value this is.

    Args:
      logits: [B, *spatial, K], K >= 2; the loss is computed in at least float32.
      labels: class of each voxel, integers [B, *spatial] in [0, K). A label out of this range
        belongs to no class: it adds nothing to the cross-entropy, but counts as a voxel of the
        mean.
      include_background: whether class 0 counts in the Dice term.

    Returns:
      Scalar.

    Raises:
      ValueError: if shapes or dtypes are not as above.
    """
    cross_entropy = cross_entropy_loss(logits, labels)
    return cross_entropy + soft_dice_loss(logits, labels, include_background=include_background)


def cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the mean of -log softmax(logits)[label] over all voxels.

    Arguments, result and errors are those of `dice_cross_entropy_loss`.
    """
    logits, members = _prepare(logits, labels)
    log_probabilities = jnp.where(members, jax.nn.log_softmax(logits), 0)
    return -log_probabilities.sum(-1).mean()


def soft_dice_loss(
    logits: jax.Array, labels: jax.Array, *, include_background: bool = True
) -> jax.Array:
    """Computes the mean of 1 - soft Dice over volumes and classes.

    With p = softmax(logits) and g the one-hot labels, for each volume and class
      Dice = (2 sum p g + smooth) / (sum p + sum g + smooth)
    which is Milletari et al. 2016 (V-Net, section 3) without their squares in the denominator, as
    in Isensee et al. 2021 and MONAI's `DiceLoss`. Arguments, result and errors are those of
    `dice_cross_entropy_loss`.
    """
    logits, members = _prepare(logits, labels)
    probabilities = jax.nn.softmax(logits)
    spatial = tuple(range(1, logits.ndim - 1))
    overlap = jnp.where(members, probabilities, 0).sum(spatial)  # [B, K]
    size = probabilities.sum(spatial) + members.sum(spatial, dtype=logits.dtype)  # [B, K]
    dice = (2 * overlap + SMOOTH) / (size + SMOOTH)
    return 1 - dice[:, 0 if include_background else 1 :].mean()


# The values of --loss.
LOSSES: dict[str, Loss] = {
    "dice_cross_entropy": dice_cross_entropy_loss,
    "cross_entropy": cross_entropy_loss,
    "dice": soft_dice_loss,
}


def _prepare(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checks the arguments and compares the labels with each class.

    Classes are picked by comparison rather than by index: the gradient of a gather is a scatter,
    which is slow to compile and to run.

    Returns:
      The logits in at least float32; and whether a voxel is of a class, bool [B, *spatial, K].
    """
    if logits.ndim < 3 or logits.shape[-1] < 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits: {logits.dtype}{logits.shape}, must be floating [B, *spatial, K] with K >= 2"
        )
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: {labels.dtype}{labels.shape}, must be integers {logits.shape[:-1]}"
        )
    logits = logits.astype(at_least_float32(logits.dtype))
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    return logits, labels[..., None] == classes
