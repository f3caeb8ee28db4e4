"""The rules of a plan, in stages: what is chosen in one may depend on those before it.

They are in the spirit of nnU-Net (Isensee et al. 2021, Methods), for a transformer with patches of
fixed size.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from train.before_plan import rounded_up, whole_patches
from train.budget import seconds
from train.checks import MONAI_SIZES, check_model
from train.command_line import DATA
from train.config import Config
from train.data.fingerprint import Fingerprint
from train.data.label_names import find_sided
from train.distributed import process_min
from train.memory import device_memory
from train.options import ModelOptions
from train.plan_sizes import crop_size, median_shape, target_spacing

# Shares of the volumes below which cropping to the foreground pays.
CROP_BELOW = 0.75
# What a training step keeps for each voxel of a batch, measured at 96^3 with widths of the paper.
BYTES_PER_VOXEL = 3000
# Parameters of the large model with gradient, two moments and average, 4 bytes each.
LARGE_MODEL_BYTES = 5 * 4 * 93_000_000
# Largest crops per axis, of the small model on CPU and of the large one.
SMALL_CROP, LARGE_CROP = 96, 160
STEPS_ON_CPU, STEPS_ON_ACCELERATOR = 2000, 50_000
# About what a step of either model takes, from which the steps of a budget are guessed.
SECONDS_OF_A_STEP = 0.5
# Numbers of a token that an attention head gets, of the small model and of the large one.
SMALL_HEAD, LARGE_HEAD = 24, 64
# The most tokens for which attention takes less time than the decoder does on CPU.
MOST_TOKENS = 2048
# An average over the last twentieth of the steps forgets the beginning, and has little noise.
AVERAGED_SHARE = 20
LARGEST_DECAY = 0.9999
VALIDATIONS = 5
LARGE_MODEL = "the paper's model, which fits the memory"
MONAI = "MONAI's UNETR has patches of 16 voxels and 12 layers"


@dataclasses.dataclass(frozen=True)
class Device:
    """What training runs on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      memory: bytes of memory of each device.
      count: devices over all processes.
    """

    platform: str
    memory: int
    count: int

    @classmethod
    def here(cls) -> "Device":
        """Returns the device that JAX uses, with the least memory that any process has for one.

        Every process must call it; so all plan the same run.
        """
        return cls(jax.default_backend(), process_min(device_memory()), jax.device_count())


@dataclasses.dataclass(frozen=True)
class Choice:
    """One option of a plan.

    Attributes:
      record: field of `Config` that has the option.
      name: field of the option there.
      value: its value.
      reason: why, in a few words.
    """

    record: str
    name: str
    value: Any
    reason: str


def _plan_scale(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses spacing and window, which depend on the data alone."""
    spacing, why_spacing = target_spacing(fingerprint)
    window = _window(fingerprint)
    choice = Choice("data", "spacing", spacing, why_spacing)
    return [choice] if window is None else [choice, window]


def _plan_training(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses cropping, which depends on the window, and what depends on data and device alone."""
    filled = fingerprint.filled(cfg.data.window)
    large = _is_large(device)
    smallest = min(fingerprint.label_fractions[1:], default=0.0)
    sided = find_sided(fingerprint.labels)
    parts, shares = cfg.training.accumulate, _batch_shares(device, cfg)
    together = device.count // shares
    divisible = f"{device.count} device(s)"
    divisible += f", {together} to a volume," if together > 1 else ""
    divisible += f" and --accumulate {parts}" if parts > 1 else ""
    return [
        Choice(
            "data",
            "crop_foreground",
            filled < CROP_BELOW,
            f"the box of the foreground fills {100 * filled:.0f} % of the median scan",
        ),
        Choice(
            "data",
            "batch_size",
            rounded_up(DATA.data.batch_size, shares * parts),
            f"the least for {divisible} that averages gradients a little",
        ),
        Choice(
            "loss",
            "loss",
            "dice_cross_entropy",
            f"Dice weighs all structures alike, and the smallest has {smallest:.2g} of the voxels",
        ),
        Choice(
            "augmentation",
            "augmentation",
            "nnunet" if large else "strong",
            f"a run of {STEPS_ON_ACCELERATOR} steps learns from nnU-Net's changes"
            if large
            else f"a run of {STEPS_ON_CPU} steps overfits without strong changes",
        ),
        Choice(
            "augmentation",
            "flips",
            () if sided else (0,),
            f"{sided!r} has a side" if sided else "no label is of the left or right alone",
        ),
        *_training(large),
    ]


def _plan_patch(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses the patches, which depend on the crops or the size of cases after preprocessing."""
    roi_size = cfg.data.roi_size
    if cfg.model.family == "monai":
        return [Choice("model", "patch_size", MONAI_SIZES["patch_size"], MONAI)]
    if _is_large(device):
        patch, reason = 16, LARGE_MODEL
    else:
        shape = roi_size or [min(n, SMALL_CROP) for n in median_shape(fingerprint, cfg.data)]
        tokens = math.prod(math.ceil(n / 4) for n in shape)
        patch = 8 if tokens > MOST_TOKENS else 4
        reason = f"the model learns more with {tokens} small patches than with larger ones"
        if patch == 8:
            reason = f"patches of 4 voxels would be {tokens} tokens a crop, too many for a CPU"
    patch_size = (patch,) * 3
    if roi_size is not None and patch_size != (fitting := whole_patches(roi_size, patch)):
        patch_size, reason = fitting, "the largest of which --roi-size is a multiple"
    return [Choice("model", "patch_size", patch_size, reason)]


def _plan_model(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses the widths, which depend on the patches, and on the heads if these are given."""
    # The default number of heads divides all widths.
    heads = cfg.model.num_heads
    numbers = math.prod(cfg.model.patch_size) * len(fingerprint.modalities)
    width = 768 if _is_large(device) else 48 if numbers <= 64 else 96
    hidden_size = rounded_up(width, heads)
    rounded = f", rounded up from {width} for --num-heads {heads}" if width % heads else ""
    if _is_large(device):
        return [
            Choice("model", "light_r", 2.0, LARGE_MODEL),
            Choice("model", "hidden_size", hidden_size, LARGE_MODEL + rounded),
            Choice("model", "num_layers", 12, LARGE_MODEL),
        ]
    monai = Choice("model", "num_layers", MONAI_SIZES["num_layers"], MONAI)
    return [
        *([monai] if cfg.model.family == "monai" else []),
        Choice("model", "light_r", 4.0, "8 halves a step's time, and learns less in the end"),
        Choice("model", "hidden_size", hidden_size, f"a patch has {numbers} numbers{rounded}"),
    ]


def _plan_heads(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses the attention heads, which depend on the width of the tokens."""
    width = cfg.model.hidden_size
    most = max(1, width // (LARGE_HEAD if _is_large(device) else SMALL_HEAD))
    heads = next(n for n in range(most, 0, -1) if width % n == 0)
    return [Choice("model", "num_heads", heads, f"of {width // heads} numbers each")]


def _plan_family(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses the family, which depends on patches, layers and widths."""
    if not _is_large(device):
        return []
    if _may_be_monai(cfg.model):
        return [Choice("model", "family", "monai", LARGE_MODEL)]
    return [Choice("model", "family", "reference", MONAI)]


def _plan_size(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses crops and epochs, which depend on preprocessing, model and batches."""
    data, large = cfg.data, _is_large(device)
    shape = median_shape(fingerprint, data)
    free = device.memory * 0.8 - LARGE_MODEL_BYTES * large
    shares = _batch_shares(device, cfg)
    at_once = max(1, data.batch_size // (shares * cfg.training.accumulate))
    together = device.count // shares
    voxels = free / BYTES_PER_VOXEL / at_once * together
    # Each device has whole patches of a volume that it shares.
    unit = (cfg.model.patch_size[0] * together, *cfg.model.patch_size[1:])
    roi_size = crop_size(shape, unit, LARGE_CROP if large else SMALL_CROP, voxels)
    median = " x ".join(f"{n:.0f}" for n in shape)
    reason = f"the median case has {median} voxels"
    reason += f", and {together} devices share a crop" if together > 1 else ""
    choices = [Choice("data", "roi_size", roi_size, reason)]
    # A budget takes the place of the epochs and of those between validations.
    if cfg.training.budget is None:
        steps_per_epoch = cfg.steps_per_epoch(fingerprint.num_train)
        steps = STEPS_ON_ACCELERATOR if large else STEPS_ON_CPU
        enough = math.ceil(steps / steps_per_epoch)
        epochs = max(VALIDATIONS, enough)
        reason = f"{epochs * steps_per_epoch} steps of {data.batch_size} crops"
        if epochs > enough:
            reason += f"; fewer epochs would leave no room for {VALIDATIONS} validations"
        choices.append(Choice("training", "epochs", epochs, reason))
    return choices


def _plan_pace(fingerprint: Fingerprint, device: Device, cfg: Config) -> list[Choice]:
    """Chooses validations and the average of weights, which depend on the epochs or the budget."""
    budget = cfg.training.budget
    if budget is not None:
        steps = max(1, int(seconds(budget) / SECONDS_OF_A_STEP))
        return [_average(steps, f"the about {steps} steps that {budget} may have")]
    epochs = cfg.training.epochs
    steps = epochs * cfg.steps_per_epoch(fingerprint.num_train)
    eval_every = max(1, epochs // VALIDATIONS)
    validations = math.ceil(epochs / eval_every)
    return [
        Choice("training", "eval_every", eval_every, f"{validations} validation(s)"),
        _average(steps, f"{steps} steps"),
    ]


def _average(steps: int, described: str) -> Choice:
    """Chooses the average of weights for a run of so many steps."""
    decay = min(max(0.0, round(1 - AVERAGED_SHARE / steps, 4)), LARGEST_DECAY)
    reason = f"{described} are too few to average weights over"
    if decay:
        reason = f"weights are averaged over {1 / (1 - decay):.0f} of {described}"
    return Choice("training", "ema_decay", decay, reason)


def _window(fingerprint: Fingerprint) -> Choice | None:
    channels = np.flatnonzero(fingerprint.windowed)
    if not channels.size:
        return None
    low = min(fingerprint.low[i] for i in channels)
    high = max(fingerprint.high[i] for i in channels)
    window = (float(math.floor(low)), float(math.ceil(max(high, low + 1))))
    return Choice("data", "window", window, "0.5th to 99.5th percentile of labeled voxels")


def _batch_shares(device: Device, cfg: Config) -> int:
    """Returns the number of parts that the devices split a batch into."""
    return max(1, device.count // cfg.run.depth_shards)


def _is_large(device: Device) -> bool:
    """Returns whether the model of the paper's size can be trained in sensible time and memory."""
    return device.platform != "cpu" and device.memory > 2 * LARGE_MODEL_BYTES


def _may_be_monai(model: ModelOptions) -> bool:
    try:
        check_model(dataclasses.replace(model, family="monai"))
    except ValueError:
        return False
    return True


def _training(large: bool) -> list[Choice]:
    if large:
        reason = "what the large model learns best with"
        return [Choice("training", "learning_rate", 1e-4, reason)]
    return [
        Choice("training", "optimizer", "muon", "the small model learns in fewer steps with it"),
        Choice("training", "learning_rate", 3e-3, "what the small model learns best with"),
        Choice("training", "b2", 0.98, f"0.999 remembers half of a run of {STEPS_ON_CPU} steps"),
        Choice("training", "weight_decay", 0.3, "the small model generalizes better with it"),
    ]


STAGES = (
    _plan_scale,
    _plan_training,
    _plan_patch,
    _plan_model,
    _plan_heads,
    _plan_family,
    _plan_size,
    _plan_pace,
)
