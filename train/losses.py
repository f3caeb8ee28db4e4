"""Losses of segmentation: cross-entropy, soft Dice, and their sum."""

import jax
import jax.numpy as jnp

from unetr_flax.ops.dtypes import at_least_float32

# Keeps the Dice of a class that is absent from label and prediction at 1 (MONAI's default).
SMOOTH = 1e-5


def dice_cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, *, include_background: bool = True
) -> jax.Array:
    """Soft Dice loss + cross-entropy, both with weight 1.

    UNETR trains with this sum (Hatamizadeh et al. 2022, section 3.2), as do nnU-Net (Isensee et al.
    2021, Methods) and MONAI's `DiceCELoss(softmax=True, to_onehot_y=True)`, whose value this is.

    Args:
      logits: [B, *spatial, K], K >= 2. Computed in at least float32.
      labels: class of each voxel, integers [B, *spatial] in [0, K). A label outside belongs to no
        class: it adds nothing to the cross-entropy, but counts as a voxel of the mean.
      include_background: whether class 0 counts in the Dice term.

    Returns:
      Scalar.

    Raises:
      ValueError: if shapes or dtypes are not as above.
    """
    cross_entropy = cross_entropy_loss(logits, labels)
    return cross_entropy + soft_dice_loss(logits, labels, include_background=include_background)


def cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the voxels of -log softmax(logits)[label]; arguments as in the sum above."""
    logits, members = _prepare(logits, labels)
    log_probabilities = jnp.where(members, jax.nn.log_softmax(logits), 0)
    return -log_probabilities.sum(-1).mean()


def soft_dice_loss(
    logits: jax.Array, labels: jax.Array, *, include_background: bool = True
) -> jax.Array:
    """Mean over volumes and classes of 1 - soft Dice; arguments as in the sum above.

    With p = softmax(logits) and g the one-hot labels, for each volume and class
      Dice = (2 sum p g + smooth) / (sum p + sum g + smooth)
    which is Milletari et al. 2016 (V-Net, section 3) without their squares in the denominator, as
    in Isensee et al. 2021 and MONAI's `DiceLoss`.
    """
    logits, members = _prepare(logits, labels)
    probabilities = jax.nn.softmax(logits)
    spatial = tuple(range(1, logits.ndim - 1))
    overlap = jnp.where(members, probabilities, 0).sum(spatial)  # [B, K]
    size = probabilities.sum(spatial) + members.sum(spatial, dtype=logits.dtype)  # [B, K]
    dice = (2 * overlap + SMOOTH) / (size + SMOOTH)
    return 1 - dice[:, 0 if include_background else 1 :].mean()


def _prepare(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checked logits in at least float32, and which class each voxel is of, bool [B, *spatial, K].

    Classes are picked by comparison rather than by index: the gradient of a gather is a scatter,
    which is slow to compile and to run.
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
