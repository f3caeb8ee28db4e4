"""The command `unetr`: parses and delegates."""

import sys

import jax
import numpy as np
import tyro
from flax import linen as nn

from unetr_flax.config import UNETRConfig
from unetr_flax.unetr import UNETR

app = tyro.extras.SubcommandApp()


@app.command
def summary(
    img_size: tuple[int, ...] = (128, 128, 128),
    in_channels: int = 1,
    out_channels: int = 4,
    patch_size: tuple[int, ...] = (16,),
    hidden_size: int = 768,
    num_layers: int = 12,
    num_heads: int = 8,
    light_r: float = 4.0,
    depth: int | None = None,
) -> None:
    """Print every module of the model with the shapes and numbers of its outputs and parameters.

    Nothing is computed, so it needs neither time nor the memory of the model.

    Args:
      img_size: voxels per axis.
      in_channels: channels of the image.
      out_channels: channels of the logits.
      patch_size: voxels per patch, one number or one per axis.
      hidden_size: width of the tokens.
      num_layers: transformer blocks.
      num_heads: attention heads.
      light_r: divisor of the decoder's widths.
      depth: how deep to go into modules; all the way if not given.
    """
    cfg = UNETRConfig.reference(
        img_size,
        in_channels,
        out_channels,
        light_r,
        patch_size=patch_size[0] if len(patch_size) == 1 else patch_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
    )
    tabulate = nn.tabulate(
        UNETR(cfg),
        jax.random.key(0),
        depth=depth,
        # Wide enough that no column is cut, whatever the terminal.
        console_kwargs={"width": 180, "force_terminal": False},
    )
    print(tabulate(np.zeros((1, *cfg.img_size, cfg.in_channels), np.float32)))


def main() -> int:
    """Runs the command line; returns 0, or 2 after one line that says what is wrong."""
    try:
        app.cli(prog="unetr", description="UNETR for volumetric segmentation in JAX/Flax.")
    except ValueError as error:
        print(f"unetr: {error}", file=sys.stderr)
        return 2
    return 0
