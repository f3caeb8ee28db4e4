"""Task01 of the Medical Segmentation Decathlon, BraTS: brain tumors in four channels of MRI.

The regions are those that BraTS scores: whole tumor, tumor core and enhancing tumor, of the task's
labels 1 edema, 2 non-enhancing and 3 enhancing tumor. Crops and model are those of UNETR
(Hatamizadeh et al. 2022, section 4.2), spacing and augmentation those of MONAI's tutorial
`brats_segmentation_3d`, which trains 300 epochs.
"""

from train.config import Config
from train.options import (
    AugmentationOptions,
    DataOptions,
    LossOptions,
    TrainingOptions,
)
from train.recipes import PAPER_MODEL

RECIPE = Config(
    data=DataOptions(
        regions=("WT=1,2,3", "TC=2,3", "ET=3"),
        spacing=(1.0, 1.0, 1.0),
        crop_foreground=True,
        roi_size=(128, 128, 128),
        batch_size=2,
    ),
    model=PAPER_MODEL,
    # MONAI's tutorial: smooth_nr 0, squared denominators.
    loss=LossOptions(squared_pred=True, smooth_nr=0.0),
    augmentation=AugmentationOptions(augmentation="monai_brats", flips=(0, 1, 2)),
    training=TrainingOptions(
        epochs=300,
        eval_every=10,
        learning_rate=1e-4,
        weight_decay=1e-5,
        warmup_fraction=0.02,
        ema_decay=0.999,
        overlap=0.5,
    ),
)
