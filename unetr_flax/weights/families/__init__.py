"""The authors whose PyTorch files can be read: one file for each, and their registry."""

from unetr_flax.weights.families.monai import MONAI
from unetr_flax.weights.families.reference import REFERENCE
from unetr_flax.weights.families.registry import (
    FAMILIES,
    Family,
    TorchModel,
    family_of,
    register,
)
from unetr_flax.weights.families.tamasino52 import TAMASINO52

__all__ = ["FAMILIES", "Family", "TorchModel", "family_of", "register"]

for _family in (REFERENCE, MONAI, TAMASINO52):
    register(_family)
