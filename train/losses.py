"""Losses of segmentation: cross-entropy, soft Dice, focal loss, and sums of them.

A loss is one function `(logits, labels, **options) -> scalar`; a new one is such a function and an
entry in `LOSSES`. All take the same options, see `LossKeywords`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp

from train.data.targets import IGNORED, region_masks
from unetr_flax.ops.dtypes import at_least_float32

Loss = Callable[[jax.Array, jax.Array], jax.Array]

# Makes the Dice of a class 1 if neither label nor prediction has the class (MONAI's default).
SMOOTH = 1e-5
# Exponent of the focal loss (Lin et al. 2017, section 3.2).
FOCAL_GAMMA = 2.0


class LossKeywords(TypedDict, total=False):
    """The options of every loss; names and defaults are those of `monai.losses.DiceCELoss`.

    Attributes:
      sigmoid: whether channels are regions that may overlap, each with its own probability, instead
        of classes that exclude each other (softmax). The cross-entropy is then the binary one,
        averaged over the channels.
      include_background: whether channel 0 counts in the Dice term; it does if it is the only one.
      squared_pred: whether probabilities and labels are squared in the denominator of Dice, as in
        Milletari et al. 2016 (V-Net, section 3).
      batch: whether Dice is that of all volumes of a batch together, instead of the mean over them.
      smooth_nr: added to the numerator of Dice.
      smooth_dr: added to the denominator of Dice.
      class_weights: weight of each channel. For softmax, the cross-entropy is the weighted mean
        over voxels, as in `torch.nn.CrossEntropyLoss`; for sigmoid, a weight multiplies the voxels
        inside its region, as `pos_weight` does in `torch.nn.BCEWithLogitsLoss`. In the Dice and
        focal losses, which are plain means, a weight multiplies all of its channel.
      ignore_label: voxels with this label count in no sum and in no mean.
    """

    sigmoid: bool
    include_background: bool
    squared_pred: bool
    batch: bool
    smooth_nr: float
    smooth_dr: float
    class_weights: Sequence[float] | None
    ignore_label: int | None


def dice_cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, **options: Unpack[LossKeywords]
) -> jax.Array:
    """Computes soft Dice loss + cross-entropy, both with weight 1.

    UNETR trains with this sum (Hatamizadeh et al. 2022, section 3.2), as do nnU-Net (Isensee et al.
    2021, Methods) and MONAI's `DiceCELoss(softmax=True, to_onehot_y=True)`, whose value this is.
    For several regions `DiceCELoss(sigmoid=True)` adds the cross-entropy of a softmax, as if the
    regions excluded each other; here it is the binary cross-entropy of each region.

    Args:
      logits: [B, *spatial, K]; the loss is computed in at least float32. K >= 2 for softmax.
      labels: for softmax, the class of each voxel, integers [B, *spatial] in [0, K). A label out of
        this range that is not `ignore_label` belongs to no class: it adds nothing to the
        cross-entropy, but counts as a voxel of the mean. For sigmoid, whether each voxel is in each
        region, booleans or integers [B, *spatial, K], each 0, 1 or `ignore_label`.
      **options: see `LossKeywords`.

    Returns:
      Scalar.

    Raises:
      ValueError: if shapes, dtypes or the number of weights are not as above.
    """
    return cross_entropy_loss(logits, labels, **options) + soft_dice_loss(logits, labels, **options)


def dice_focal_loss(
    logits: jax.Array, labels: jax.Array, **options: Unpack[LossKeywords]
) -> jax.Array:
    """Computes soft Dice loss + focal loss, both with weight 1.

    Arguments, result and errors are those of `dice_cross_entropy_loss`.
    """
    return focal_loss(logits, labels, **options) + soft_dice_loss(logits, labels, **options)


def cross_entropy_loss(
    logits: jax.Array, labels: jax.Array, **options: Unpack[LossKeywords]
) -> jax.Array:
    """Computes the mean over voxels of -log softmax(logits)[label], or of its binary counterpart.

    Arguments, result and errors are those of `dice_cross_entropy_loss`.
    """
    logits, members, counted, weights = _prepare(logits, labels, options)
    if options.get("sigmoid", False):
        inside = jnp.where(members, jax.nn.log_sigmoid(logits), 0)
        inside = inside if weights is None else weights * inside
        outside = jnp.where(members, 0, jax.nn.log_sigmoid(-logits))
        return _mean(-(inside + outside), counted)
    log_probabilities = jnp.where(members, jax.nn.log_softmax(logits), 0)
    if weights is None:
        return _mean(-log_probabilities.sum(-1), None if counted is None else counted[..., 0])
    members = members if counted is None else members & counted
    total = jnp.where(members, weights, 0).sum()
    return -jnp.where(members, weights * log_probabilities, 0).sum() / _not_zero(total)


def focal_loss(logits: jax.Array, labels: jax.Array, **options: Unpack[LossKeywords]) -> jax.Array:
    """Computes the mean over voxels and channels of (1 - p)^2 times the cross-entropy -log p.

    This is Lin et al. 2017 (equation 4) and `monai.losses.FocalLoss`, with p the probability that
    the prediction gives to the truth: voxels that are clear already hardly count. Arguments, result
    and errors are those of `dice_cross_entropy_loss`.
    """
    logits, members, counted, weights = _prepare(logits, labels, options)
    if options.get("sigmoid", False):
        log_truth = jax.nn.log_sigmoid(jnp.where(members, logits, -logits))
        log_rest = jax.nn.log_sigmoid(jnp.where(members, -logits, logits))
        loss = -jnp.exp(FOCAL_GAMMA * log_rest) * log_truth
    else:
        log_truth = jax.nn.log_softmax(logits)
        loss = jnp.where(members, -((1 - jnp.exp(log_truth)) ** FOCAL_GAMMA) * log_truth, 0)
    return _mean(loss if weights is None else weights * loss, counted)


def soft_dice_loss(
    logits: jax.Array, labels: jax.Array, **options: Unpack[LossKeywords]
) -> jax.Array:
    """Computes the mean of 1 - soft Dice over volumes and channels.

    With p the probabilities and g the labels as 0 and 1, for each volume and channel
      Dice = (2 sum p g + smooth_nr) / (sum p + sum g + smooth_dr)
    as in Isensee et al. 2021 and MONAI's `DiceLoss`. Arguments, result and errors are those of
    `dice_cross_entropy_loss`.
    """
    logits, members, counted, weights = _prepare(logits, labels, options)
    sigmoid = options.get("sigmoid", False)
    probabilities = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)
    if counted is not None:
        probabilities = jnp.where(counted, probabilities, 0)
        members = members & counted
    axes = tuple(range(0 if options.get("batch", False) else 1, logits.ndim - 1))
    overlap = jnp.where(members, probabilities, 0).sum(axes)  # [B, K], or [K] of the whole batch
    predicted = probabilities**2 if options.get("squared_pred", False) else probabilities
    size = predicted.sum(axes) + members.sum(axes, dtype=logits.dtype)
    numerator = 2 * overlap + options.get("smooth_nr", SMOOTH)
    dice_loss = 1 - numerator / (size + options.get("smooth_dr", SMOOTH))
    # MONAI does not weight a single channel either.
    if weights is not None and weights.size > 1:
        dice_loss = weights * dice_loss
    if options.get("include_background", True) or logits.shape[-1] == 1:
        return dice_loss.mean()
    return dice_loss[..., 1:].mean()


# The values of --loss.
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "dice_cross_entropy": dice_cross_entropy_loss,
    "dice_focal": dice_focal_loss,
    "cross_entropy": cross_entropy_loss,
    "dice": soft_dice_loss,
}


def make_loss(name: str, **options: Unpack[LossKeywords]) -> Loss:
    """Returns the loss of a name in `LOSSES` with options filled in."""
    return functools.partial(LOSSES[name], **options)


def make_target_loss(name: str, *, has_regions: bool, **options: Unpack[LossKeywords]) -> Loss:
    """Returns a loss of the targets that the data have, see `train.data.targets`.

    Args:
      name: name of the loss in `LOSSES`.
      has_regions: whether targets hold regions, not classes.
      **options: see `LossKeywords`.
    """
    loss = make_loss(name, **{**options, "sigmoid": has_regions, "ignore_label": IGNORED})

    def regions_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return loss(logits, region_masks(targets, logits.shape[-1]))

    return regions_loss if has_regions else loss


class _Operands(NamedTuple):
    """What losses compute with.

    Attributes:
      logits: in at least float32, [B, *spatial, K].
      members: whether a voxel is of a class or in a region, bool [B, *spatial, K].
      counted: whether a voxel counts, bool [B, *spatial, K or 1]; None if all do.
      weights: weight of each channel, [K]; None if all are 1.
    """

    logits: jax.Array
    members: jax.Array
    counted: jax.Array | None
    weights: jax.Array | None


def _prepare(logits: jax.Array, labels: jax.Array, options: LossKeywords) -> _Operands:
    """Checks the arguments and compares the labels with each class.

    Classes are picked by comparison rather than by index: the gradient of a gather is a scatter,
    which is slow to compile and to run.
    """
    sigmoid = options.get("sigmoid", False)
    fewest = 1 if sigmoid else 2
    floating = jnp.issubdtype(logits.dtype, jnp.floating)
    if logits.ndim < 3 or logits.shape[-1] < fewest or not floating:
        raise ValueError(
            f"logits: {logits.dtype}{logits.shape}, must be floating [B, *spatial, K] with K >= "
            f"{fewest}"
        )
    shape = logits.shape if sigmoid else logits.shape[:-1]
    whole = jnp.issubdtype(labels.dtype, jnp.integer) or (sigmoid and labels.dtype == jnp.bool_)
    if labels.shape != shape or not whole:
        raise ValueError(f"labels: {labels.dtype}{labels.shape}, must be integers {shape}")
    logits = logits.astype(at_least_float32(logits.dtype))
    labels = labels if sigmoid else labels[..., None]
    classes = 1 if sigmoid else jnp.arange(logits.shape[-1], dtype=labels.dtype)
    members = labels == classes
    ignore_label = options.get("ignore_label")
    counted = None if ignore_label is None else labels != ignore_label
    class_weights = options.get("class_weights")
    if class_weights is None:
        return _Operands(logits, members, counted, None)
    weights = jnp.asarray(class_weights, logits.dtype)
    if weights.shape != logits.shape[-1:]:
        raise ValueError(
            f"class_weights: {weights.size} numbers, must be one for each of {logits.shape[-1]} "
            "channels"
        )
    return _Operands(logits, members, counted, weights)


def _mean(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Computes the mean of the values that count; 0 if none does."""
    if counted is None:
        return values.mean()
    counted = jnp.broadcast_to(counted, values.shape)
    return jnp.where(counted, values, 0).sum() / _not_zero(counted.sum(dtype=values.dtype))


def _not_zero(total: jax.Array) -> jax.Array:
    """Replaces a sum of nothing, 0, by 1."""
    return jnp.where(total == 0, 1, total)
