"""`unetr verify`: comparison of a PyTorch model and its port on the same input."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from unetr_flax.commands.convert import describe
from unetr_flax.commands.models import Model, load_model
from unetr_flax.commands.told import Told
from unetr_flax.commands.verdict import Verdict
from unetr_flax.imaging.intensity import ZScore, background
from unetr_flax.imaging.nifti import read_volume
from unetr_flax.imaging.padding import centered_start, crop_or_pad
from unetr_flax.imaging.preprocessing import Preprocessing
from unetr_flax.runtime.compilation_cache import keep_for_accelerators
from unetr_flax.weights import CheckpointError


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """The model to compare with, and the volumes that both models are run on."""

    torch_module: str | None = None
    """Your own module instead of the family's original, FILE.py:FACTORY; the file is run, and
    FACTORY() makes the module, which gets the checkpoint's weights."""

    volume: Path | None = None
    """A NIfTI scan to compare on too, preprocessed, its middle cut or filled to the window."""

    batch: int = 1
    """Number of random volumes. The output of every Flax module is kept."""

    seed: int = 0
    """Seed of the random volumes."""


def verify(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    volumes: VerifyOptions,
    told: Annotated[Told, tyro.conf.arg(name="model")],
) -> None:
    """Run a checkpoint's PyTorch original and its Flax port, and compare every module.

    Both get the checkpoint's own weights and the same input, in float64 and in float32. Where they
    differ, every module is compared on equal inputs, and the cause is named. The exit status is 0
    if all differences are rounding and 1 if not. Needs torch, and for MONAI's models monai.

    Args:
      source: PyTorch file, or model folder.
      volumes: The model to compare with, and the volumes that both models are run on.
      told: Facts about the model in a PyTorch file that its shapes do not tell.
    """
    if volumes.batch < 1:
        raise CheckpointError(f"--batch {volumes.batch}: must be at least 1")
    try:
        import unetr_flax.parity.own_module as own_module
        import unetr_flax.parity.verify as parity
        from unetr_flax.parity.diagnose import told as told_findings
        from unetr_flax.parity.rows import worst_of
        from unetr_flax.parity.table import print_table
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"unetr verify needs {error.name}: pip install 'unetr-flax[torch]'"
        ) from None
    model = load_model(source, told)
    print(f"{source}: {describe(model)}")
    volume = None if volumes.volume is None else _window(volumes.volume, model)
    keep_for_accelerators()
    module, prefix = None, ""
    if volumes.torch_module is not None:
        module = own_module.load_module(volumes.torch_module)
        prefix, notes = own_module.adopt(module, model.state_dict, model.cfg)
        print(f"{volumes.torch_module}: {type(module).__name__}, with the checkpoint's weights")
        for note in notes:
            print(f"  {note}")
    inputs = parity.Inputs(volume, volumes.batch, volumes.seed, module, prefix)
    rows = parity.verify(model.cfg, model.state_dict, inputs)
    print_table(rows)
    failed = [row for row in rows if not row.ok]
    if failed:
        findings, meaning = parity.explain(model.cfg, model.state_dict, rows, inputs)
        for line in [*told_findings(findings), *([meaning] if meaning else [])]:
            print(line)
        worst = worst_of(failed)
        raise Verdict(
            f"{source}: {len(failed)} of {len(rows)} comparisons differ by more than rounding, "
            f"{worst.name} most, by {worst.relative:.1e}"
        )


def _window(path: Path, model: Model) -> np.ndarray:
    """Reads a scan and prepares the middle of it in the shape of the model's input.

    Returns:
      [1, *img_size, in_channels], float32.
    """
    cfg, preprocessing = model.cfg, model.preprocessing
    volume = read_volume(path)
    channels = volume.array.shape[-1]
    if (cfg.spatial_rank, cfg.in_channels) != (3, channels):
        raise CheckpointError(
            f"--volume {path}: 3 axes and {channels} channels, the model takes "
            f"{cfg.spatial_rank} and {cfg.in_channels}"
        )
    if preprocessing is None:
        names = tuple(f"channel {i}" for i in range(channels))
        preprocessing = Preprocessing(names, (ZScore(),) * channels)
        print(f"{path}: mean 0 and deviation 1, as the model's own preprocessing is not known")
    else:
        print(f"{path}: preprocessed as the model's folder says")
    image, grid = preprocessing.apply(volume)
    start = centered_start(grid.shape, cfg.img_size)
    return crop_or_pad(image, start, cfg.img_size, fill=background(image))[None]
