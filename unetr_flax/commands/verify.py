"""`unetr verify`: a PyTorch model and its port, side by side on the same input."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from unetr_flax.commands.convert import describe
from unetr_flax.commands.models import Told, load_model
from unetr_flax.model.config import UNETRConfig
from unetr_flax.runtime.compilation_cache import keep_for_accelerators
from unetr_flax.weights import CheckpointError


class ParityError(Exception):
    """The two models differ by more than rounding."""


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What to run them on."""

    volume: Path | None = None
    """A NIfTI volume to compare on too, its middle cut or filled to the model's window."""

    batch: int = 1
    """Random volumes. Every module's output is kept for both models."""

    seed: int = 0
    """Of the random volumes."""


def verify(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    volumes: VerifyOptions,
    told: Annotated[Told, tyro.conf.arg(name="model")],
) -> None:
    """Run the PyTorch original and the Flax port of a checkpoint, and compare every module.

    Both get the checkpoint's own weights and the same input, in float64 and in float32. The exit
    status is 0 if all differences are rounding and 1 if not. Needs torch, and for MONAI's models
    monai.

    Args:
      source: PyTorch file, or folder of ours.
      volumes: What to run them on.
      told: What the shapes in a PyTorch file do not tell.
    """
    if volumes.batch < 1:
        raise CheckpointError(f"--batch {volumes.batch}: must be at least 1")
    try:
        import unetr_flax.parity.verify as parity
        from unetr_flax.parity.table import print_table
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"unetr verify needs {error.name}: pip install 'unetr-flax[torch]'"
        ) from None
    model = load_model(source, told)
    print(f"{source}: {describe(model)}")
    volume = None if volumes.volume is None else _window(volumes.volume, model.cfg)
    keep_for_accelerators()
    rows = parity.verify(
        model.cfg,
        model.state_dict,
        volume=volume,
        batch=volumes.batch,
        seed=volumes.seed,
    )
    print_table(rows)
    failed = [row for row in rows if not row.ok]
    if failed:
        worst = max(failed, key=lambda row: row.relative / row.tolerance)
        raise ParityError(
            f"{source}: {len(failed)} of {len(rows)} comparisons differ by more than rounding, "
            f"{worst.name} most, by {worst.relative:.1e}"
        )


def _window(path: Path, cfg: UNETRConfig) -> np.ndarray:
    """The middle of a volume, normalized, in the shape of the model's input."""
    from unetr_flax.imaging.nifti import read_volume
    from unetr_flax.imaging.padding import centered_start, crop_or_pad

    image = read_volume(path).array.astype(np.float64)  # [X, Y, Z, C]
    if (cfg.spatial_rank, cfg.in_channels) != (3, image.shape[-1]):
        raise CheckpointError(
            f"--volume {path}: 3 axes and {image.shape[-1]} channels, the model takes "
            f"{cfg.spatial_rank} and {cfg.in_channels}"
        )
    image = (image - image.mean()) / (image.std() or 1)
    start = centered_start(image.shape[:-1], cfg.img_size)
    return crop_or_pad(image, start, cfg.img_size)[None]
