"""The options of a run: frozen records whose fields and docstrings are the command line."""

import dataclasses
from pathlib import Path
from typing import Literal

# The values of --recipe; each is a file in train/recipes/ with a `RECIPE`.
RECIPE_NAMES = ("hippocampus", "spleen", "brats", "btcv-paper", "btcv-monai", "phantoms")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data, and how they are cut."""

    data: Path | None = None
    """Folder of images and label maps, or a JSON list of them; phantoms are made if None."""

    modalities: tuple[str, ...] | None = None
    """Names of the images' channels, such as CT or MRI; those that the data declare if None."""

    regions: tuple[str, ...] | None = None
    """Overlapping regions to segment instead of classes, such as WT=1,2,3 TC=2,3 ET=3."""

    allow_grid_mismatch: bool = False
    """Take a label map that does not lie on its image's grid voxel by voxel."""

    num_phantoms: int = 20
    """Number of phantoms to make if there is no --data."""

    val_fraction: float = 0.2
    """Share of the cases that is kept for validation; 0 trains on all of them."""

    num_folds: int | None = None
    """Folds of a cross-validation, of which --fold is kept for validation; none if None."""

    fold: int = 0
    """Which fold, or which split of --splits, is kept for validation, from 0."""

    splits: Path | None = None
    """File with lists of training and validation cases, as nnU-Net's splits_final.json."""

    spacing: tuple[float, float, float] | None = None
    """Millimeters per voxel and axis to resample to; each volume keeps its own if None."""

    window: tuple[float, float] | None = None
    """Lowest and highest intensity of channels named CT, in Hounsfield units; -175 250 if None."""

    crop_foreground: bool = False
    """Crop each volume to the box of what is above its lowest normalized intensity."""

    roi_size: tuple[int, int, int] | None = None
    """Voxels per axis that the model sees, multiples of --patch-size; from the data if None."""

    batch_size: int = 2
    """Volumes per step, over all devices and processes."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The UNETR; see `unetr_flax.UNETRConfig`."""

    family: Literal["reference", "monai"] = "reference"
    """The article's UNETR, or MONAI's, which has 12 layers and patches of 16 16 16."""

    patch_size: tuple[int, int, int] = (8, 8, 8)
    """Voxels per token and axis, each 1, 2, 4, 8 or 16."""

    light_r: float = 4.0
    """Divisor of the decoder's 32 to 512 channels; MONAI's feature size is 32 / --light-r."""

    hidden_size: int = 96
    """Width of the tokens; 768 in the paper."""

    num_layers: int = 4
    """Transformer blocks; 12 in the paper."""

    num_heads: int = 4
    """Attention heads; divides --hidden-size."""

    dropout_rate: float = 0.0
    """Probability of dropping embeddings, attention weights and feed-forward units."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation. Parameters, statistics, softmax and loss stay float32."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The loss; see `train.losses`."""

    loss: str = "dice_cross_entropy"
    """The loss: dice_cross_entropy or dice_focal (sums of two), cross_entropy or dice."""

    exclude_background: bool = False
    """Leave the background out of the Dice term."""

    squared_pred: bool = False
    """Square probabilities and labels in the denominator of Dice."""

    batch_dice: bool = False
    """Compute Dice of all volumes of a step, or of a part of --accumulate, together."""

    smooth_nr: float = 1e-5
    """Number added to the numerator of Dice."""

    smooth_dr: float = 1e-5
    """Number added to the denominator of Dice."""

    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, the background first; all are equal if None."""


@dataclasses.dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of the crops; see `train.data.augment`."""

    augmentation: str = "default"
    """Rotation, zoom, intensities: default, none, nnunet, strong, unetr_btcv, monai_btcv or
    monai_brats."""

    flips: tuple[int, ...] = ()
    """Axes (0, 1, 2: right, anterior, superior) along which crops are flipped at random."""

    flip_probability: float = 0.5
    """Probability of a flip along each axis of --flips."""

    rotate90_probability: float = 0.0
    """Probability of a rotation by 90, 180 or 270 degrees of axes 0 and 1, which need one size."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The optimizer, the schedule and the validation."""

    recipe: str | None = None
    """Recipe in train/recipes/ whose options are the defaults of all others."""

    init: Path | None = None
    """Model folder whose weights the run starts from; classes, channels and window may differ."""

    init_encoder: Path | None = None
    """PyTorch file of a pretrained vision transformer that the encoder starts from, as `unetr
    convert --encoder-for` takes it."""

    epochs: int = 24
    """Passes over the training cases."""

    budget: str | None = None
    """Time of the whole run, such as 15m or 2h, which sets its steps in place of the epochs."""

    optimizer: str = "adamw"
    """adamw, or muon, which orthogonalizes the updates of matrices and kernels."""

    learning_rate: float = 4e-3
    """Highest learning rate, after a linear warm-up and before the --schedule."""

    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine or poly (power 0.9), both to 0, or constant."""

    warmup_fraction: float = 0.05
    """Share of all steps that is warm-up."""

    layer_decay: float = 1.0
    """Factor of the learning rate from each transformer block to the one before it."""

    weight_decay: float = 1e-2
    """Decoupled weight decay; only kernels decay."""

    b2: float = 0.999
    """Decay of AdamW's average of squared gradients; below 0.999 for a few thousand steps."""

    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to take less memory."""

    remat: bool = False
    """Compute each block again in the backward pass instead of keeping its results, to take less
    memory."""

    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is validated, too; 0 for none."""

    stochastic_depth: float = 0.0
    """Probability of skipping the last transformer block; earlier ones are skipped less often."""

    eval_every: int = 8
    """Epochs between validations, at each of which a checkpoint is saved."""

    overlap: float = 0.25
    """Share of the window that neighbors have in common in validation."""

    seed: int = 0
    """Seed of split, parameters, order and augmentation of the data, dropout and phantoms."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The folder and the processes of the run. Only these may differ when it is resumed."""

    out: Path | None = None
    """Folder for checkpoints, logs and results; runs/ and the name of the data if None."""

    resume: Literal["no", "yes", "auto"] = "no"
    """Go on from the last checkpoint in --out, with the options that the run was started with; auto
    starts a new run if there is none. --resume alone means yes."""

    keep_checkpoints: int = 2
    """Number of last checkpoints to keep; the best is kept besides."""

    save_minutes: float = 10.0
    """Longest time between two checkpoints; there is one at each validation in any case."""

    fsdp: int = 1
    """Devices that share the parameters and the optimizer's state, and split the batch as well."""

    depth_shards: int = 1
    """Devices that share each volume, split along its first axis, for large --roi-size."""

    coordinator_address: str | None = None
    """host:port of process 0, for several processes that no cluster has started."""

    num_processes: int = 1
    """Processes of the run."""

    process_id: int = 0
    """Number of this process, from 0."""

    keep_freed_memory: bool = False
    """On CPU with glibc: keep freed memory for later steps, which are faster for it."""

    cache: Path | None = None
    """Folder of prepared cases, which runs may share; one in ~/.cache if None."""

    workers: int | None = None
    """Processes that prepare cases; as many as processors and memory allow if None."""

    compilation_cache: str | None = None
    """Private folder of compiled programs, '' for none; one in ~/.cache if None."""


def option(name: str) -> str:
    """Returns the name of a field as it is written on the command line."""
    return "--" + name.replace("_", "-")
