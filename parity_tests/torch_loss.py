"""Dice and cross-entropy in PyTorch, written from the definition; the twin of `train.losses`."""

import torch
import torch.nn.functional as F


def dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the mean cross-entropy plus one minus the mean soft Dice over classes and volumes.

    Args:
      logits: [B, K, *spatial].
      labels: [B, *spatial], int64.
    """
    cross_entropy = F.cross_entropy(logits, labels)
    axes = tuple(range(2, logits.ndim))
    probabilities = torch.softmax(logits, dim=1)
    truth = torch.movedim(F.one_hot(labels, logits.shape[1]), -1, 1).to(logits.dtype)
    intersection = (probabilities * truth).sum(axes)
    denominator = probabilities.sum(axes) + truth.sum(axes)
    dice = (2 * intersection + 1e-5) / (denominator + 1e-5)
    return cross_entropy + (1 - dice).mean()
