"""Task09 of the Medical Segmentation Decathlon: the spleen in CT.

Window, spacing and crops are those of MONAI's tutorial `spleen_segmentation_3d`, whose 600 epochs
of 4 crops from each case are 2,400 passes here. Its steps have 8 crops, 4 of each of 2 cases; here
they have 2, and there are 4 times as many of them. Half of the crops are centered on the spleen;
there the others are centered on background voxels above the window's lower end, here they are drawn
uniformly from the whole volume. The model and the augmentation are those with which UNETR was
trained on this task (Hatamizadeh et al. 2022, section 4.2).
"""

from train.config import Config
from train.options import AugmentationOptions, DataOptions, TrainingOptions
from train.recipes import PAPER_MODEL
from unetr_flax.imaging.presets import PRESETS

RECIPE = Config(
    data=DataOptions(
        spacing=PRESETS["spleen"].spacing,
        window=(-57.0, 164.0),
        crop_foreground=PRESETS["spleen"].crop_foreground,
        roi_size=(96, 96, 96),
        batch_size=2,
    ),
    model=PAPER_MODEL,
    augmentation=AugmentationOptions(
        augmentation="unetr_btcv", flips=(0, 1, 2), flip_probability=0.2, rotate90_probability=0.2
    ),
    training=TrainingOptions(
        epochs=2400,
        eval_every=40,
        learning_rate=1e-4,
        weight_decay=1e-5,
        warmup_fraction=0.01,
        ema_decay=0.999,
        overlap=0.5,
    ),
)
