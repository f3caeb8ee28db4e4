"""The ladder: the rungs of the comparison by name, from single outputs to scores of volumes."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from parity_tests.gradients import gradient_rows
from parity_tests.half_precision import half_precision_rows
from parity_tests.ratio_rows import RatioRow
from parity_tests.small import small, tiny
from parity_tests.trajectory import TRAININGS, trajectory_rows
from parity_tests.volume_to_score import volume_rows
from unetr_flax import UNETRConfig
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import Row
from unetr_flax.parity.twins import Twins

AnyRow = Row | RatioRow


@dataclasses.dataclass(frozen=True)
class Rung:
    """One kind of comparison.

    Attributes:
      compare: compares twins.
      reduce: makes the configuration smaller, for a rung that runs the model often; None compares
        the model itself.
      dtypes: dtypes of the twins that the rung is climbed with; the first that the platform has
        if the model is a smaller one.
      families: families that have what it compares; None for all.
      fewest_classes: channels of the logits that it needs.
    """

    compare: Callable[[Twins], Sequence[AnyRow]]
    reduce: Callable[[UNETRConfig], UNETRConfig] | None = None
    dtypes: tuple[str, ...] = ("float64",)
    families: tuple[str, ...] | None = None
    fewest_classes: int = 1


def random_mask(twins: Twins, seed: int = 1) -> np.ndarray:
    """Draws a boolean attention mask [B, H, N, N], one row of which is wholly masked."""
    n = twins.cfg.num_patches
    mask = np.random.default_rng(seed).random((len(twins.image), twins.cfg.num_heads, n, n)) < 0.7
    mask[0, 0, 0] = False
    return mask


def _masked_rows(twins: Twins) -> list[Row]:
    return activation_rows(twins, random_mask(twins))


def _all_trajectories(twins: Twins) -> list[Row]:
    return [row for training in TRAININGS for row in trajectory_rows(twins, training)]


BOTH = ("float64", "float32")

RUNGS: dict[str, Rung] = {
    "activations": Rung(activation_rows, dtypes=BOTH),
    # Only the reference's PyTorch model takes a mask.
    "masked activations": Rung(_masked_rows, dtypes=BOTH, families=("reference",)),
    # The losses are of classes that exclude each other.
    "gradients": Rung(lambda twins: gradient_rows(twins, train=False), fewest_classes=2),
    "training": Rung(lambda twins: gradient_rows(twins, train=True), fewest_classes=2),
    "trajectory": Rung(_all_trajectories, reduce=tiny, fewest_classes=2),
    "volume to score": Rung(volume_rows, reduce=small, dtypes=BOTH, fewest_classes=2),
    # The exact numbers are PyTorch's, so no platform needs float64.
    "half precision": Rung(half_precision_rows, reduce=small, dtypes=BOTH),
}
