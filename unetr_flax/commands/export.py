"""`unetr export`: a model as a program for other software."""

import dataclasses
import datetime
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unetr_flax.commands.models import Model, load_model
from unetr_flax.commands.told import Told


@dataclasses.dataclass(frozen=True)
class StablehloOptions:
    """The StableHLO program."""

    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Platforms that the one program runs on."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation and of the logits. Weights and image are float32."""

    with_weights: bool = False
    """Whether the weights are in the program; otherwise they are in a file beside it."""

    lowering: Literal["auto", "xla"] = "auto"
    """The fastest form of each operation for each platform, or XLA's own operations only."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The form of the output."""

    format: Literal["stablehlo", "onnx"] = "stablehlo"
    """StableHLO for JAX without Flax, or ONNX for ONNX Runtime, Triton and TensorRT."""

    overwrite: bool = False
    """Whether to replace an older export in OUT."""


def export(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    output: ExportOptions,
    stablehlo: Annotated[StablehloOptions, tyro.conf.arg(name="stablehlo")],
    told: Annotated[Told, tyro.conf.arg(name="model")],
) -> None:
    """Export a model's forward pass as a program that runs without this package.

    OUT is a folder with the program, the weights, and export.json, which says what goes in and
    comes out, the preprocessing, and which versions are sure to load it. The batch size is left
    open. StableHLO is loaded by jax.export; image and logits have their channels last. ONNX is made
    from the PyTorch model of the family with the same weights, and checked by ONNX Runtime; there
    image and logits have their channels first.

    Args:
      source: Model folder, or PyTorch file.
      target: The folder to write; it appears whole or not at all.
      output: The form of the output.
      stablehlo: The StableHLO program; not with --format onnx.
      told: Facts about the model in a PyTorch file that its shapes do not tell.
    """
    from unetr_flax.commands.convert import describe
    from unetr_flax.export.errors import ExportError
    from unetr_flax.export.folder import new_folder
    from unetr_flax.export.manifest import write_manifest

    if output.format == "onnx":
        for field in dataclasses.fields(stablehlo):
            if getattr(stablehlo, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise ExportError(f"--{option}: only with --format stablehlo")
    with new_folder(target, overwrite=output.overwrite) as folder:
        model = load_model(source, told)
        print(f"{source}: {describe(model)}")
        program = _write(folder, model, output.format, stablehlo)
        write_manifest(
            folder,
            model.cfg,
            preprocessing=model.preprocessing,
            provenance=model.provenance,
            command=_command(),
            program=program,
        )
        sizes = [f"{file.name} {_size(file)}" for file in sorted(folder.iterdir())]
    if output.format == "onnx":
        error = program["onnxruntime_relative_error"]
        print(f"ONNX Runtime's logits equal the model's to {error:.1e} of the largest")
    else:
        print(_loads(program))
    print(f"{target}: written, {', '.join(sizes)}")


def _write(
    folder: Path, model: Model, form: Literal["stablehlo", "onnx"], options: StablehloOptions
) -> dict[str, Any]:
    if form == "onnx":
        from unetr_flax.export.onnx import write_onnx

        return write_onnx(folder, model.cfg, model.variables)
    from unetr_flax.export.stablehlo import write_stablehlo

    return write_stablehlo(folder, model.cfg, model.variables, **vars(options))


def _loads(program: dict[str, Any]) -> str:
    """Says which versions of JAX are sure to load a StableHLO program."""
    sure = program["sure_to_load"]
    line = (
        f"sure to load in a JAX that was built from {sure['jax_built_from']} to "
        f"{sure['jax_built_until']} (counted from {sure['counted_from']})"
    )
    if datetime.date.fromisoformat(sure["jax_built_until"]) < datetime.date.today():
        line += "; not surely in today's: export with a newer JAX for it"
    return line


def _command() -> str:
    """Returns the command that was given, such that it replaces what it wrote."""
    given = sys.argv[1:]
    return shlex.join(["unetr", *given, *(["--overwrite"] if "--overwrite" not in given else [])])


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
