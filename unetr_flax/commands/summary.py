"""`unetr summary`: the modules of a model, and the cost of its forward pass."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from flax.linen.summary import tabulate

from unetr_flax.commands.models import load_model
from unetr_flax.commands.told import Told
from unetr_flax.model.abstract import abstract_image, abstract_variables
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.runtime.compilation_cache import keep_for_accelerators
from unetr_flax.weights import CheckpointError


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a fresh model of the reference family, if no MODEL is given."""

    in_channels: int = 1
    """Channels of the image."""

    out_channels: int = 4
    """Channels of the logits."""

    patch_size: tuple[int, ...] = (16,)
    """Voxels per patch, one number or one per axis."""

    hidden_size: int = 768
    """Width of the tokens."""

    num_layers: int = 12
    """Transformer blocks."""

    light_r: float = 4.0
    """Divisor of the decoder's widths."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The content of the table."""

    depth: int | None = None
    """Depth down to which modules are listed; all of them if not given."""

    batch: tuple[int, ...] = ()
    """Batch sizes whose forward pass is compiled on this machine, to tell the memory it needs."""


def summary(
    table: Table,
    told: Annotated[Told, tyro.conf.arg(name="model")],
    fresh: Annotated[Sizes, tyro.conf.arg(name="fresh model")],
    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None,
) -> None:
    """Print every module with the shapes and numbers of its outputs, and costs.

    Without --batch nothing is computed, so it needs neither time nor the memory of a model.

    Args:
      table: The content of the table.
      told: Facts about the model in a PyTorch file that its shapes do not tell.
      fresh: Sizes of a fresh model of the reference family, if no MODEL is given.
      model: Model folder, or PyTorch file; if not given, a fresh model.
    """
    if model is None:
        for name in ("norm", "norm_groups", "ignore"):
            if getattr(told, name) != getattr(Told(), name):
                option = name.replace("_", "-")
                raise CheckpointError(f"--{option}: only with a PyTorch file")
        cfg = _fresh(fresh, told)
    elif fresh != Sizes():
        raise CheckpointError(f"{model}: says its sizes itself, no option can")
    else:
        cfg = load_model(model, told).cfg
    net = UNETR(cfg)
    # This width cuts no column, whatever the width of the terminal.
    console = {"width": 180, "force_terminal": False}
    render = tabulate(net, jax.random.key(0), depth=table.depth, console_kwargs=console)
    print(render(np.zeros((1, *cfg.img_size, cfg.in_channels), np.float32)))
    flops = forward_flops(net)
    if flops is not None:
        print(f"{flops:.4g} FLOPs per volume, forward")
    if table.batch:
        keep_for_accelerators()
    for batch in table.batch:
        temporary, total = forward_memory(net, batch)
        print(
            f"batch {batch}: {total / 2**30:.2f} GiB forward on {jax.default_backend()}, of which "
            f"{temporary / 2**30:.2f} GiB besides weights, image and logits"
        )


def forward_flops(net: UNETR) -> float | None:
    """Returns the floating-point operations of one volume's forward pass, as XLA counts them.

    None if XLA does not count them on this platform.
    """
    costs = _lowered(net, 1).cost_analysis()
    return costs and costs["flops"]


def forward_memory(net: UNETR, batch: int) -> tuple[int, int]:
    """Returns bytes of intermediate results, and all bytes, of the compiled forward pass.

    Raises:
      ValueError: if the compiler of this platform does not tell.
    """
    memory = _lowered(net, batch).compile().memory_analysis()
    if memory is None:
        raise ValueError(f"--batch: {jax.default_backend()}'s compiler tells no sizes of memory")
    temporary = memory.temp_size_in_bytes
    return temporary, temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes


def _lowered(net: UNETR, batch: int) -> jax.stages.Lowered:
    return jax.jit(net.apply).lower(abstract_variables(net), abstract_image(net.config, batch))


def _fresh(sizes: Sizes, told: Told) -> UNETRConfig:
    patch_size = sizes.patch_size
    return UNETRConfig.reference(
        img_size=told.img_size or (128, 128, 128),
        patch_size=patch_size[0] if len(patch_size) == 1 else patch_size,
        num_heads=8 if told.num_heads is None else told.num_heads,
        skip_layers=told.skip_layers,
        dropout_rate=told.dropout_rate,
        **{name: value for name, value in vars(sizes).items() if name != "patch_size"},
    )
