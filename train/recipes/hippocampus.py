"""Task04 of the Medical Segmentation Decathlon: anterior and posterior hippocampus in T1 MRI.

The volumes are small (about 35 x 50 x 36 voxels of 1 mm) and show one hippocampus each, the left or
the right one, so crops hold a whole case. The decoder gets all that lies between the voxels and the
patches from the tokens, so patches of 4 voxels, whose tokens hold as many numbers as the patch,
learn more than patches of 8. The weights are averaged, by which validation rises until the end:
with the weights themselves it wavers by several hundredths while the learning rate is high.

The choices were made on 128 cases and 32 others, for two CPU cores. With patches of 8 voxels,
tokens of 96 numbers and an eighth of the paper's widths in the decoder, Dice after 1,536 steps:
0.865 by AdamW as it is usual, 0.862 if crops are also mirrored in left and right, 0.8645 with twice
as many steps of one volume, which take the same time; 0.873 if AdamW forgets squared gradients
sooner (b2); by Muon 0.869, and 0.873 with stronger changes of the crops. After 4,608 steps: 0.872
by AdamW, 0.8769 by Muon, and 0.8777 after 3,072 with more weight decay. With a quarter of the
widths, by Muon: 0.8705 after 704 steps, 0.8788 after 1,984; 0.8702 after 704 with instance norms.

With patches of 4 voxels and a quarter of the widths, after 704 steps: 0.8791 with tokens of 96
numbers in 0.73 s a step, 0.8789 with tokens of 48 and two heads in 0.53 s (patches of 8: 0.42 s).
With an eighth of the widths: 0.8734 after 768 steps of 0.30 s; with three eighths 0.8821 after 704
steps that take 1.9 times as long, with a half 0.8833 at 3.2 times. In an hour a half of the widths
is 2,157 steps, by which it learns less than a quarter of them by 6,734.

For the hour, with 64 cases and 96 others: 0.8832 after 1,600 steps, and 0.8814 if crops are also
mirrored. With more weight decay (1.0) 0.8820 after 960 of the steps, where it was 0.8827; with
nnU-Net's changes of intensities besides 0.8785 after 640, where it was 0.8805. The rate does decay:
if it stays high and the average is longer, 0.8840 after 960 steps is the best, and on all cases
nothing is gained after 2,000. What is turned out of a volume is background in crops: where it
repeats the volume's edge instead, 0.8820 after 640 steps, but 0.8816 after all, and on all cases
0.8819 after 4,368 of an hour's steps. With the predictions of the averaged weights as half of the
truth, for which a step takes a quarter more time, 0.8839 after 1,280 steps and 0.8832 after all.
Crops of the median size cut most cases in some axis. With 40 x 56 x 40 voxels, as nnU-Net takes, a
step takes a quarter more time too, and Dice is 0.8842 after 1,280 steps and 0.8845 after all; on
all cases, 5 minutes of it give 0.868, where they give 0.870 as it is, and nearly as many steps as
an hour holds give 0.8837 at best (after 2,240 of 4,927), where they give 0.886. The model of that
run marks 5 % too many voxels; with 0.5 added to the background's logit, 2 % and 0.8844, which no
other offset surpasses. Averages over windows that are shifted by one to three voxels give 0.0005 at
most. With squared probabilities in the loss's Dice, with another 64 cases: 0.8831 after 640 steps,
and 0.8844 without.

How much is learned from few cases, with 32 and 128 others: 0.8764 after 768 of 1,024 steps. 0.8722
if crops are rotated by up to 30 degrees, zoomed by a quarter and sheared; 0.8767 with dropout and
stochastic depth of a tenth; labels that are resampled linearly are not better, either (0.8750 after
512 steps, where it was 0.8753).
"""

import dataclasses

from train.config import Config
from train.options import AugmentationOptions, DataOptions, ModelOptions, TrainingOptions

# In less time than this, more steps of a smaller model learn more.
SECONDS_OF_LARGER_MODEL = 8 * 60

RECIPE = Config(
    data=DataOptions(batch_size=2),
    model=ModelOptions(patch_size=(4, 4, 4), light_r=4.0, hidden_size=48, num_heads=2),
    augmentation=AugmentationOptions(augmentation="strong"),
    training=TrainingOptions(
        epochs=24,
        eval_every=8,
        optimizer="muon",
        learning_rate=3e-3,
        b2=0.98,
        weight_decay=0.3,
        ema_decay=0.99,
    ),
)


def for_budget(seconds: float) -> Config:
    """Returns the recipe for a run of a given time, on two CPU cores."""
    if seconds >= SECONDS_OF_LARGER_MODEL:
        return RECIPE
    return dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, light_r=8.0))
