"""Recipes: the options with which a known task is trained, `RECIPE` in a file for each.

A file may also have `for_budget(seconds)`, which returns the recipe for `--budget`.
"""

from train.options import ModelOptions

# The model with which UNETR's authors train, MONAI's (Hatamizadeh et al. 2022, section 4.2).
PAPER_MODEL = ModelOptions(
    family="monai",
    patch_size=(16, 16, 16),
    light_r=2.0,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
)
