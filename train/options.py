"""The options of a run: four frozen records whose fields and docstrings are the command line."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data, and how they are cut."""

    data: Path | None = None
    """Folder in the layout of the Medical Segmentation Decathlon; phantoms are made if None."""

    num_phantoms: int = 20
    """Number of phantoms to make if there is no --data."""

    val_fraction: float = 0.2
    """Share of the cases that is kept for validation."""

    spacing: tuple[float, float, float] | None = None
    """Millimeters per voxel and axis to resample to; each volume keeps its own if None."""

    roi_size: tuple[int, int, int] | None = None
    """Voxels per axis that the model sees, multiples of --patch-size; from the data if None."""

    batch_size: int = 2
    """Volumes per step, over all devices and processes."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The UNETR; see `unetr_flax.UNETRConfig.reference`."""

    patch_size: tuple[int, int, int] = (8, 8, 8)
    """Voxels per token and axis, each 1, 2, 4, 8 or 16."""

    light_r: float = 4.0
    """Divisor of the decoder's 32 to 512 channels; may be fractional."""

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
class TrainingOptions:
    """The loss, the augmentation, the optimizer and the schedule."""

    loss: str = "dice_cross_entropy"
    """The loss: dice_cross_entropy (their sum), cross_entropy or dice."""

    augmentation: str = "default"
    """Random changes of the crops: default (rotation, zoom, contrast, noise) or none."""

    epochs: int = 24
    """Passes over the training cases."""

    learning_rate: float = 4e-3
    """Highest learning rate of AdamW, after a linear warm-up and before a cosine decay to 0."""

    warmup_fraction: float = 0.05
    """Share of all steps that is warm-up."""

    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW; only kernels decay."""

    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    eval_every: int = 8
    """Epochs between validations, after each of which a checkpoint is saved."""

    overlap: float = 0.25
    """Share of the window that neighbors have in common in validation."""

    seed: int = 0
    """Seed of split, parameters, order and augmentation of the data, dropout and phantoms."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The folder and the processes of the run. Only these may differ when it is resumed."""

    out: Path | None = None
    """Folder for checkpoints, logs and results; runs/ and the name of the data if None."""

    resume: bool = False
    """Go on from the last checkpoint in --out, with the options that the run was started with."""

    fsdp: int = 1
    """Devices that share the parameters and the optimizer's state, and split the batch as well."""

    depth_shards: int = 1
    """Devices that share each volume, split along its first axis, for large --roi-size."""

    coordinator_address: str | None = None
    """host:port of process 0, to train with several processes, each with its own devices."""

    num_processes: int = 1
    """Processes of the run."""

    process_id: int = 0
    """Number of this process, from 0."""

    keep_freed_memory: bool = False
    """On CPU with glibc: keep freed memory for later steps, which are faster for it."""

    compilation_cache: str | None = None
    """Private folder of compiled programs, '' for none; one in ~/.cache if None."""
