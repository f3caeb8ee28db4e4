"""BTCV, 13 abdominal organs in CT, as MONAI's tutorial `unetr_btcv_segmentation_3d` trains UNETR.

It takes 25,000 iterations of four crops at a constant rate: 4,167 passes over the 24 training cases
with one crop each. There the four crops of a step are of one case, here of four. Half of the crops
are centered on organs; there the others are centered on background voxels above the window's lower
end, here they are drawn uniformly from the whole volume.
"""

import dataclasses

from train.options import AugmentationOptions, LossOptions
from train.recipes import btcv_paper

RECIPE = dataclasses.replace(
    btcv_paper.RECIPE,
    loss=LossOptions(),
    augmentation=AugmentationOptions(
        augmentation="monai_btcv", flips=(0, 1, 2), flip_probability=0.1, rotate90_probability=0.1
    ),
    training=dataclasses.replace(
        btcv_paper.RECIPE.training,
        epochs=4167,
        eval_every=83,
        schedule="constant",
        warmup_fraction=0.0,
    ),
)
