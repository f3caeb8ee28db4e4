"""The ladder: the rungs of the comparison by name, from single outputs to whole trainings."""

from collections.abc import Callable

import numpy as np

from parity_tests.gradients import gradient_rows
from parity_tests.trajectory import trajectory_rows
from unetr_flax.parity.activations import activation_rows
from unetr_flax.parity.rows import Row
from unetr_flax.parity.twins import Twins


def random_mask(twins: Twins, seed: int = 1) -> np.ndarray:
    """Draws a boolean attention mask [B, H, N, N], one row of which is wholly masked."""
    n = twins.cfg.num_patches
    mask = np.random.default_rng(seed).random((len(twins.image), twins.cfg.num_heads, n, n)) < 0.7
    mask[0, 0, 0] = False
    return mask


RUNGS: dict[str, Callable[[Twins], list[Row]]] = {
    "activations": activation_rows,
    "masked activations": lambda twins: activation_rows(twins, random_mask(twins)),
    "gradients": lambda twins: gradient_rows(twins, train=False),
    "training": lambda twins: gradient_rows(twins, train=True),
    "trajectory": lambda twins: [
        row for name in ("adamw", "sgd") for row in trajectory_rows(twins, name)
    ],
}
