"""Task04 of the Medical Segmentation Decathlon: anterior and posterior hippocampus in T1 MRI.

The volumes are small (about 35 x 50 x 36 voxels of 1 mm) and show one hippocampus each, the left or
the right one, so crops hold a whole case and may be mirrored in left and right. The intensities are
augmented as in nnU-Net (Isensee et al. 2021), and the weights are averaged: on 128 cases, without
both, the Dice of other cases falls in the last third of a longer training.
"""

from train.config import Config
from train.options import AugmentationOptions, DataOptions, TrainingOptions

RECIPE = Config(
    data=DataOptions(batch_size=2),
    augmentation=AugmentationOptions(augmentation="nnunet", flips=(0,)),
    training=TrainingOptions(epochs=40, eval_every=8, learning_rate=3e-3, ema_decay=0.99),
)
