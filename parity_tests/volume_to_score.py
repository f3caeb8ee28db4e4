"""The rung from a volume to its scores: sliding windows, loss, Dice and HD95, against MONAI's."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch

from train.losses import dice_cross_entropy_loss
from unetr_flax import sliding_window_inference
from unetr_flax.evaluation.scores import evaluate_case
from unetr_flax.inference.windows import importance
from unetr_flax.parity.diagnose import Finding
from unetr_flax.parity.rows import Row, compare_arrays
from unetr_flax.parity.run_once import jit_to_run_once
from unetr_flax.parity.training import explain_loss
from unetr_flax.parity.twins import Twins, channels_first, channels_first_tensor

# Voxels that the volume has more than the window, per axis; a shorter axis is padded.
EXCESS = (5, -3, 6)
OVERLAP = 0.25
SIGMA_SCALE = 0.125
# mm per voxel, different in each axis.
SPACING = (0.8, 0.9, 2.5)


def volume_rows(twins: Twins) -> list[Row]:
    """Compares the logits of a whole volume, and then losses and scores of each side's own logits.

    MONAI computes its gaussian weights in float32. They are compared in float32, and logits that
    they blend with MONAI's window function given the weights in the logits' dtype.

    Args:
      twins: both models; the PyTorch one runs in MONAI's window function.

    Raises:
      ModuleNotFoundError: if monai is not installed.
    """
    with warnings.catch_warnings():
        # MONAI 1.6 passes deprecated arguments itself.
        warnings.simplefilter("ignore", FutureWarning)
        # Of classes without voxels, which `_score_rows` expects.
        warnings.filterwarnings("ignore", "the prediction of class")
        return _volume_rows(twins)


def _volume_rows(twins: Twins) -> list[Row]:
    from monai.data.utils import compute_importance_map
    from monai.inferers.utils import sliding_window_inference as monai_inference

    cfg = twins.cfg
    roi = cfg.img_size
    shape = tuple(n + more for n, more in zip(roi, EXCESS, strict=False))
    rng = np.random.default_rng(3)
    volume = rng.standard_normal((1, *shape, cfg.in_channels)).astype(twins.dtype)
    apply = jit_to_run_once(twins.model.apply)

    def predict(windows: np.ndarray) -> jax.Array:
        return apply(twins.variables, windows)

    weights = importance(roi, "gaussian", (SIGMA_SCALE,) * len(roi))
    their_weights = compute_importance_map(roi, mode="gaussian", sigma_scale=SIGMA_SCALE)
    rung = "sliding window"
    rows = [
        compare_arrays(rung, "gaussian weights", weights.astype("float32"), their_weights.numpy())
    ]
    logits = {}
    for mode in ("constant", "gaussian"):
        ours = sliding_window_inference(volume, roi, predict, OVERLAP, mode, SIGMA_SCALE, 2)
        given = None if mode == "constant" else torch.from_numpy(weights.astype(twins.dtype))
        with torch.no_grad():
            theirs = monai_inference(
                channels_first_tensor(volume),
                roi,
                2,
                twins.torch_model,
                overlap=OVERLAP,
                mode=mode,
                roi_weight_map=given,
            )
        logits[mode] = np.asarray(ours), theirs
        rows.append(compare_arrays(rung, f"logits, {mode}", channels_first(ours), theirs.numpy()))
    labels = _labels(rng, shape, cfg.out_channels)
    ours, theirs = logits["gaussian"]
    # Nearly every class occurs in the label maps of logits with mean 0 and deviation 1.
    axes = tuple(range(1, ours.ndim - 1))
    ours = (ours - ours.mean(axes, keepdims=True)) / ours.std(axes, keepdims=True)
    axes = tuple(i + 1 for i in axes)
    theirs = theirs - theirs.mean(axes, keepdim=True)
    theirs = theirs / theirs.std(axes, correction=0, keepdim=True)
    return [*rows, *_loss_rows(ours, theirs, labels), *_score_rows(ours, theirs, labels)]


def _labels(rng: np.random.Generator, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Draws a label map of one volume, of slanted slabs of equal volume, int32 [1, *spatial]."""
    slope = sum(np.linspace(0, 1, n).reshape(-1, *(1,) * i) for i, n in enumerate(reversed(shape)))
    level = slope + 0.2 * rng.random(shape)
    # By rank, so that each of many classes occurs.
    labels = np.empty(level.size, np.int32)
    labels[np.argsort(level, axis=None)] = np.arange(level.size) * num_classes // level.size
    return labels.reshape(1, *shape)


def _loss_rows(ours: np.ndarray, theirs: torch.Tensor, labels: np.ndarray) -> list[Row]:
    """Compares Dice + cross-entropy, and its gradient by the logits."""
    rows = []
    for background in (True, False):
        name = f"DiceCE loss, {'with' if background else 'without'} background"
        pairs = zip(*_losses(ours, theirs, labels, background), strict=True)
        for key, pair in zip((name, f"{name}, gradient"), pairs, strict=True):
            rows.append(compare_arrays("loss", key, *pair))
    return rows


def loss_findings(twins: Twins) -> list[Finding]:
    """Explains why the losses differ on the same logits, with their gradients by them."""
    cfg = twins.cfg
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((2, cfg.out_channels, *cfg.img_size)).astype(twins.dtype)
    labels = rng.integers(0, cfg.out_channels, (2, *cfg.img_size), dtype=np.int32)
    for background in (True, False):
        ours, theirs = _losses(
            np.moveaxis(logits, 1, -1), torch.from_numpy(logits), labels, background
        )
        right = {"background": background}
        if findings := explain_loss(logits, labels, ours, theirs, right=right):
            return findings
    return []


def _losses(
    ours: np.ndarray, theirs: torch.Tensor, labels: np.ndarray, background: bool
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Computes this project's loss and MONAI's, each with its gradient by its logits."""
    from monai.losses.dice import DiceCELoss

    loss = DiceCELoss(include_background=background, softmax=True, to_onehot_y=True)
    x = theirs.clone().requires_grad_()
    expected = loss(x, torch.from_numpy(labels)[:, None])
    expected.backward()

    def compute(x):
        return dice_cross_entropy_loss(x, labels, include_background=background)

    value, gradient = jax.jit(jax.value_and_grad(compute))(jnp.asarray(ours))
    return (
        (np.asarray(value), channels_first(gradient)),
        (expected.detach().numpy(), x.grad.numpy()),
    )


def _score_rows(ours: np.ndarray, theirs: torch.Tensor, labels: np.ndarray) -> list[Row]:
    """Compares Dice and HD95 of the label maps of both sides; MONAI returns them in float32.

    A model of few features may predict some of many classes nowhere. Their Dice is 0, and their
    distance is infinite here and nan or infinite in MONAI. So HD95 is compared for all classes that
    either side predicts, where one that only one side predicts differs.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice

    num_classes = theirs.shape[1]

    def one_hot(classes: torch.Tensor) -> torch.Tensor:
        return torch.movedim(torch.nn.functional.one_hot(classes.long(), num_classes), -1, 1)

    spacing = SPACING[: labels.ndim - 1]
    pair = one_hot(theirs.argmax(1)), one_hot(torch.from_numpy(labels))
    expected = {
        "dice": compute_dice(*pair, include_background=False),
        "hd95": compute_hausdorff_distance(*pair, percentile=95, spacing=spacing),
    }
    prediction = ours.argmax(-1)
    scores = evaluate_case(prediction[0], labels[0], spacing, ids=range(1, num_classes))
    dice, hd95 = (
        (
            np.array([getattr(found, name) for found in scores.values()], np.float32),
            values[0].float().numpy(),
        )
        for name, values in expected.items()
    )
    either = ~(np.isposinf(hd95[0]) & ~np.isfinite(hd95[1]))
    # Logits without finite numbers predict nothing, which must not hold.
    either |= not either.any()
    return [
        compare_arrays("scores", "Dice of each class", *dice),
        compare_arrays(
            "scores", "HD95 of each class that is predicted", *(each[either] for each in hd95)
        ),
    ]
