"""`unetr convert`: PyTorch weights to a model folder, and back."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from unetr_flax.commands.encoders import read_encoder, read_target
from unetr_flax.commands.models import CONFIG_METADATA, Model, load_model, read_preprocessing
from unetr_flax.commands.regions import add_facts, tell_regions
from unetr_flax.commands.told import Told
from unetr_flax.inference.regions import Regions
from unetr_flax.weights import (
    CheckpointError,
    resize_position_embedding,
    save_pretrained,
    to_torch,
    write_state_dict,
)
from unetr_flax.weights.unused_keys import unused_keys


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """The form of the output."""

    to: Literal["flax", "torch"] = "flax"
    """A model folder with config.json and model.safetensors, or a PyTorch state dict."""

    monai: str | None = None
    """MONAI's version that the state dict is for, such as 1.4; the latest known if not given."""

    resize_to: tuple[int, ...] | None = None
    """Voxels per axis of another window, to which the position embeddings are interpolated."""

    preprocessing: str | None = None
    """btcv, spleen, hippocampus or a JSON file: what is done to a scan before the model, stored in
    the model folder for `unetr predict`."""

    regions: tuple[str, ...] | None = None
    """Name of each output, stored in the model folder, if outputs are sigmoids of regions and not
    classes: TC WT ET for 4D masks, or with the class ids that each has, TC=1,3 WT=1,2,3 ET=3."""

    encoder_for: Path | None = None
    """A model folder, or the JSON of a configuration: IN is a pretrained vision transformer, and
    OUT becomes this model with its encoder. All other weights are the folder's, or random."""

    encoder_img_size: tuple[int, ...] | None = None
    """Voxels per axis of the window that the encoder was trained with; required unless the number
    of its patches tells it."""

    overwrite: bool = False
    """Whether to replace OUT if it is there."""


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    output: ConvertOptions,
    told: Annotated[Told, tyro.conf.arg(name="model")],
) -> None:
    """Convert PyTorch weights to a folder that every command takes, or back.

    Files of torch.save and safetensors are read, of this project's reference, of MONAI's UNETR
    from 0.7 on, and of github.com/tamasino52/UNETR, with any prefix that a wrapper such as DDP,
    Lightning or torch.compile leaves. Nothing in a file is ever executed. With --encoder-for, IN
    is a ViT, ViTAutoEnc or MaskedAutoEncoderViT of MONAI, or one of SelfMedMAE.

    Args:
      source: PyTorch file, or model folder.
      target: Folder; with --to torch a file that ends in .safetensors, .pt, .pth, .ckpt or .bin.
      output: The form of the output.
      told: Facts about the model in a PyTorch file that its shapes do not tell.
    """
    if target.exists() and not output.overwrite:
        raise CheckpointError(f"{target}: is there already; --overwrite replaces it")
    if output.monai is not None and output.to != "torch":
        raise CheckpointError("--monai: only with --to torch")
    if output.encoder_img_size is not None and output.encoder_for is None:
        raise CheckpointError("--encoder-img-size: only with --encoder-for")
    if output.preprocessing is not None and output.to != "flax":
        raise CheckpointError("--preprocessing: only for a model folder, not with --to torch")
    if output.regions is not None and output.to != "flax":
        raise CheckpointError("--regions: only for a model folder, not with --to torch")
    preprocessing = (
        None if output.preprocessing is None else read_preprocessing(output.preprocessing)
    )
    model = load_model(source, told) if output.encoder_for is None else _model(source, output, told)
    cfg, variables = model.cfg, model.variables
    if output.resize_to is not None:
        cfg, variables = resize_position_embedding(cfg, variables, output.resize_to)
        model = dataclasses.replace(model, cfg=cfg, variables=variables)
    if preprocessing is not None:
        model = dataclasses.replace(model, preprocessing=preprocessing)
    print(f"{source}: {describe(model)}")
    if output.regions is not None:
        model = _of_regions(source, model, output.regions)
    if output.to == "flax":
        if cfg.out_channels == 1 and Regions.from_provenance(source, model.provenance) is None:
            print("  one output, a region that unetr predict needs a name of: --regions NAME")
        save_pretrained(
            target,
            cfg,
            variables,
            preprocessing=model.preprocessing,
            provenance=model.provenance,
        )
    else:
        state_dict = {**to_torch(variables, cfg), **unused_keys(cfg, output.monai)}
        metadata = {CONFIG_METADATA: json.dumps(cfg.to_dict())}
        write_state_dict(target, state_dict, metadata)
    print(f"{target}: written")


def _model(source: Path, output: ConvertOptions, told: Told) -> Model:
    """Makes the model of --encoder-for with the encoder in `source`, and prints what became of it.

    Raises:
      CheckpointError: if the encoder does not fit, or options are given that tell of whole models.
    """
    if dataclasses.replace(told, ignore=()) != Told():
        raise CheckpointError("--encoder-for: tells all of the model, of the options --ignore goes")
    assert output.encoder_for is not None
    model = read_target(output.encoder_for)
    variables, transfer = read_encoder(
        source, model.cfg, model.variables, output.encoder_img_size, told.ignore
    )
    print(transfer.describe())
    # What is known of the other weights still holds, such as what the outputs are.
    facts = {"encoder": source.name, "model": output.encoder_for.name}
    provenance = add_facts(model.provenance, facts)
    return dataclasses.replace(model, variables=variables, provenance=provenance)


def _of_regions(source: Path, model: Model, option: Sequence[str]) -> Model:
    """Returns a model whose outputs are the regions of --regions, and prints what they become.

    Raises:
      ValueError: if there are not as many as the model has outputs, or it tells regions itself.
    """
    provenance = tell_regions(source, model.provenance, option)
    regions = Regions.from_provenance(source, provenance)
    assert regions is not None
    regions.check_outputs(model.cfg.out_channels)
    print(f"  {regions.describe()}")
    known = model.preprocessing
    # Its labels are names of classes.
    preprocessing = None if known is None else dataclasses.replace(known, labels=())
    return dataclasses.replace(model, preprocessing=preprocessing, provenance=provenance)


def describe(model: Model) -> str:
    """Describes a model and how its file held it in a few lines."""
    cfg = model.cfg
    idle = cfg.num_layers - cfg.skip_layers[-1]
    unused = ""
    if idle and model.held is not None:
        # Which shapes do not tell, so the default may be wrong.
        unused = f" (the last {idle} feed nothing, --skip-layers if they do)"
    count = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    assumed = " (taken for a cube, --img-size if it is not)" if model.cube_assumed else ""
    lines = [
        f"UNETR of family {cfg.family!r}, {count:,} parameters",
        f"  window {_sizes(cfg.img_size)}{assumed}, patches {_sizes(cfg.patch_size)}, "
        f"{cfg.in_channels} -> {cfg.out_channels} channels",
        f"  {cfg.num_layers} blocks of width {cfg.hidden_size}, {cfg.num_heads} heads, "
        f"feed-forward {cfg.mlp_dim}; features after blocks {_list(cfg.skip_layers)}{unused}",
        f"  decoder {_list(cfg.channels)} channels, {cfg.block} blocks, {cfg.norm} norm",
    ]
    if model.held is not None:
        lines.append(f"  read from a {model.held}")
    if model.dropped:
        keys = "1 key" if len(model.dropped) == 1 else f"{len(model.dropped)} keys"
        lines.append(f"  {keys} that the model never applies dropped, such as {model.dropped[0]}")
    return "\n".join(lines)


def _sizes(values: tuple[int, ...]) -> str:
    return " x ".join(map(str, values))


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
