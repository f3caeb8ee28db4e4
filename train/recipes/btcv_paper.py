"""BTCV, 13 abdominal organs in CT, as the authors of UNETR train (Hatamizadeh et al. 2022).

The numbers are those of the authors' code, `UNETR/BTCV` in Project-MONAI/research-contributions:
AdamW, 50 of 5,000 epochs of warm-up, then a cosine; a step has four crops, half of them centered on
organs. There the other half are centered on background voxels above the window's lower end, here
they are drawn uniformly from the whole volume. There all four are of one case; here they are of
four cases, and an epoch is a pass over the cases with one crop each, so that 5,000 epochs are
20,000. Three faults of that code are not repeated: its first epoch has rate 0, it reports the
validation of the last case alone, and it scores on the resampled grid.
"""

from train.config import Config
from train.options import (
    AugmentationOptions,
    DataOptions,
    LossOptions,
    TrainingOptions,
)
from train.recipes import PAPER_MODEL
from unetr_flax.imaging.presets import PRESETS

RECIPE = Config(
    data=DataOptions(
        spacing=PRESETS["btcv"].spacing,
        window=(-175.0, 250.0),
        crop_foreground=PRESETS["btcv"].crop_foreground,
        roi_size=(96, 96, 96),
        batch_size=4,
    ),
    model=PAPER_MODEL,
    loss=LossOptions(squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6),
    augmentation=AugmentationOptions(
        augmentation="unetr_btcv", flips=(0, 1, 2), flip_probability=0.2, rotate90_probability=0.2
    ),
    training=TrainingOptions(
        epochs=20_000,
        eval_every=400,
        learning_rate=1e-4,
        weight_decay=1e-5,
        warmup_fraction=0.01,
        # Their gradients are not clipped.
        clip_norm=1e6,
        overlap=0.5,
    ),
)
