"""The options of `python -m parity_tests`, and the configuration that they describe."""

import dataclasses
from pathlib import Path
from typing import Literal

from parity_tests.ladder import RUNGS
from unetr_flax import UNETRConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the Flax UNETR with its PyTorch original, number by number.

    Exit status: 0 if every comparison is within its tolerance, 1 if not, 2 for unusable options and
    if nothing was compared.
    """

    family: Literal["reference", "monai"] = "reference"
    """the article's model, or MONAI's, which needs the package monai"""
    img_size: tuple[int, ...] = (32, 16, 48)
    """voxels per axis"""
    in_channels: int = 1
    """channels of the image"""
    out_channels: int = 4
    """channels of the logits"""
    patch_size: tuple[int, ...] = (16,)
    """voxels per patch, one number or one per axis; MONAI's is 16"""
    hidden_size: int = 768
    """width of the tokens"""
    num_layers: int = 12
    """transformer blocks; MONAI's are 12"""
    num_heads: int | None = None
    """attention heads; 8, or 12 for MONAI's, if not given"""
    mlp_dim: int | None = None
    """width of the feed-forward layer; 4 x hidden size if not given"""
    light_r: float = 4.0
    """divisor of the reference's decoder widths"""
    feature_size: int = 16
    """width of MONAI's decoder at full resolution"""
    batch: int = 2
    """volumes in the batch; smaller models get 2"""
    seed: int = 0
    """seed of weights, images and masks"""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """which rungs to climb"""
    platform: Literal["cpu", "gpu", "tpu"] = "cpu"
    """where the Flax side runs; PyTorch stays on the CPU"""
    checkpoint: Path | None = None
    """a checkpoint of that model (torch.save or safetensors) instead of random weights"""
    out: Path = Path("runs/parity")
    """folder for report.html, report.md, report.json and error_by_depth.png"""
    causes: bool = False
    """instead, plant errors in small models and print which causes are named; takes minutes"""
    healthy: bool = False
    """with --causes, also diagnose 43 small models that agree, which must accuse nothing"""

    def config(self) -> UNETRConfig:
        """Makes the configuration of the model that is compared.

        Raises:
          ValueError: if an option is unusable; the message says which.
        """
        unknown = [rung for rung in self.rungs if rung not in RUNGS]
        if unknown or not self.rungs:
            raise ValueError(f"--rungs {' '.join(unknown)}: must be among {', '.join(RUNGS)}")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")
        sizes = (self.img_size, self.in_channels, self.out_channels)
        if self.family == "reference":
            patch_size = self.patch_size
            return UNETRConfig.reference(
                *sizes,
                self.light_r,
                patch_size=patch_size[0] if len(patch_size) == 1 else patch_size,
                hidden_size=self.hidden_size,
                num_layers=self.num_layers,
                num_heads=8 if self.num_heads is None else self.num_heads,
                mlp_dim=self.mlp_dim,
            )
        for name, value in (("patch_size", (16,)), ("num_layers", 12)):
            if getattr(self, name) != value:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: MONAI's models have no other than the default")
        return UNETRConfig.monai(
            *sizes,
            self.feature_size,
            self.hidden_size,
            4 * self.hidden_size if self.mlp_dim is None else self.mlp_dim,
            12 if self.num_heads is None else self.num_heads,
        )
