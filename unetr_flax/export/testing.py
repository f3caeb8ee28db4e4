"""Small models of both families for the tests of this room."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unetr_flax import UNETR, Preprocessing, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import save_pretrained

# Sizes of axes and numbers of channels differ, so that no exchange of axes goes unnoticed.
CONFIGS = {
    "reference": UNETRConfig.reference(
        (16, 8, 24), 2, 3, 32, patch_size=8, hidden_size=8, num_layers=4, num_heads=2
    ),
    "monai": UNETRConfig.monai(
        (32, 16, 48), 2, 3, feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2
    ),
}
PREPROCESSING = {
    "reference": Preprocessing.from_modalities(
        ["CT", "T1"], labels=["background", "liver", "spleen"], spacing=(1.5, 1.5, 2.0)
    ),
    "monai": None,
}


class Case:
    """A model of a family with random weights, in a folder, and the logits of three windows.

    Attributes:
      family: name of the family.
      cfg: the configuration.
      variables: random variables.
      folder: the model folder, with the preprocessing of `PREPROCESSING`.
      image: [3, *img_size, in_channels].
    """

    def __init__(self, family: str, path: Path):
        rng = np.random.default_rng(0)
        self.family, self.cfg = family, CONFIGS[family]
        self.variables = jax.tree.map(
            functools.partial(_random, rng), abstract_variables(UNETR(self.cfg))
        )
        self.folder = path / "model"
        save_pretrained(
            self.folder,
            self.cfg,
            self.variables,
            preprocessing=PREPROCESSING[family],
            provenance={"source": family},
        )
        shape = (3, *self.cfg.img_size, self.cfg.in_channels)
        self.image = rng.standard_normal(shape, np.float32)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """Logits of the Flax model, by its plain definition: [3, *img_size, out_channels]."""
        model = UNETR(self.cfg, lowering="xla")
        return np.asarray(jax.jit(model.apply)(self.variables, self.image))


def relative_error(a: Any, b: np.ndarray) -> float:
    """Returns max|a - b| / max|b| of arrays of one shape."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def _random(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Draws an array; vectors, among them variances, are positive."""
    values = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) == 1:
        return 0.5 + np.abs(values)
    # Keeps activations of order one through all layers.
    return values * np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
