"""python -m benchmarks.tpu_compile: what the TPU's compiler says of the model, without a TPU.

Needs the package libtpu, and runs as
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu_compile
one at a time, as the compiler holds a lock. Computation is bfloat16, parameters are float32.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.console import Console

from train.losses import dice_cross_entropy_loss
from train.state import abstract_state
from train.step import make_predict, make_train_step
from unetr_flax import UNETR, UNETRConfig

# Memory of one chip in GiB, and the topologies that are asked for.
CHIPS = {"v5e:2x2": 16, "v5p:2x2x1": 95, "v6e:2x2": 32}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled."""

    topologies: tuple[str, ...] = ("v5e:2x2",)
    """Of v5e:2x2, v5p:2x2x1 and v6e:2x2; one of the chips is used."""

    edges: tuple[int, ...] = (96,)
    """Voxels per axis."""

    batch: int = 1
    """Volumes."""

    light_r: float = 4.0
    """Divisor of the decoder's widths."""

    family: str = "reference"
    """reference or monai."""

    programs: tuple[str, ...] = ("forward", "step")
    """forward, step (training step), step-remat."""

    out: Path = Path("runs/tpu_compile.json")
    """Where the figures go, after every program; older ones of other programs are kept."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The compiler's figures of one program on one chip.

    Attributes:
      topology: which chip.
      model: family, light_r, edge and batch.
      program: "forward", "step" or "step-remat".
      temporary: bytes of intermediate results.
      total: bytes of intermediate results, arguments and results, donated ones once.
      flops: floating-point operations.
      traffic: bytes read and written in the chip's memory.
      seconds: what compiling took.
    """

    topology: str
    model: str
    program: str
    temporary: int
    total: int
    flops: float
    traffic: float
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether one chip has room for it."""
        return self.total <= CHIPS[self.topology] * 2**30


def compile_program(
    topology: str, cfg: UNETRConfig, batch: int, program: str, model_name: str
) -> Figures:
    """Compiles a program for one chip of a topology."""
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    model = UNETR(cfg, dtype=jnp.bfloat16, remat=program == "step-remat")
    update = optax.adamw(1e-3)
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    image = struct((batch, *cfg.img_size, cfg.in_channels), jnp.float32)
    labels = struct((batch, *cfg.img_size), jnp.int32)
    state = abstract_state(model, update, sharding)
    start = time.perf_counter()
    if program == "forward":
        lowered = make_predict(model).lower(state.variables, image)
    else:
        step = make_train_step(model, update, dice_cross_entropy_loss)
        lowered = step.lower(state, {"image": image, "label": labels})
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Figures(
        topology=topology,
        model=model_name,
        program=program,
        temporary=memory.temp_size_in_bytes,
        total=memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=cost["flops"],
        traffic=cost["bytes accessed"],
        seconds=seconds,
    )


def main(args: list[str]) -> int:
    """Returns the exit status: 0, 1 if something does not fit its chip, 2 for bad options."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.tpu_compile")
    console = Console()
    try:
        configs = {
            edge: UNETRConfig.monai((edge,) * 3, 1, 4)
            if options.family == "monai"
            else UNETRConfig.reference((edge,) * 3, 1, 4, options.light_r)
            for edge in options.edges
        }
        if unknown := set(options.topologies) - set(CHIPS):
            raise ValueError(f"--topologies {sorted(unknown)}: must be among {list(CHIPS)}")
        if unknown := set(options.programs) - {"forward", "step", "step-remat"}:
            raise ValueError(f"--programs {sorted(unknown)}: must be forward, step, step-remat")
        if options.family not in ("reference", "monai"):
            raise ValueError(f"--family {options.family}: must be reference or monai")
    except ValueError as error:
        print(f"tpu_compile: {error}", file=sys.stderr)
        return 2
    width = f" light_r {options.light_r:g}" if options.family == "reference" else ""
    fits = True
    for topology in options.topologies:
        for edge, cfg in configs.items():
            name = f"{options.family}{width}, {edge}^3, batch {options.batch}"
            for program in options.programs:
                with console.status(f"{topology}: {name}: {program}"):
                    try:
                        found = compile_program(topology, cfg, options.batch, program, name)
                    except jax.errors.JaxRuntimeError as error:
                        # The compiler itself refuses what exceeds the chip.
                        if "RESOURCE_EXHAUSTED" not in str(error):
                            raise
                        fits = False
                        first = str(error).splitlines()[0][:200]
                        console.print(f"{topology}: {name}: {program}: DOES NOT FIT: {first}")
                        continue
                fits &= found.fits
                _keep(options.out, found)
                console.print(line(found), highlight=False, soft_wrap=True)
    return 0 if fits else 1


def line(found: Figures) -> str:
    """The figures of a program as a row of Markdown."""
    return (
        f"| {found.topology} | {found.model} | {found.program} "
        f"| {found.total / 2**30:.2f} of {CHIPS[found.topology]} GiB "
        f"| {found.temporary / 2**30:.2f} GiB | {found.flops / 1e12:.2f} T "
        f"| {found.traffic / 2**30:.1f} GiB | {found.seconds:.0f} s "
        f"| {'fits' if found.fits else 'DOES NOT FIT'} |"
    )


def _keep(path: Path, found: Figures) -> None:
    """Adds figures to a file, in the place of older ones of the same program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    names = ("topology", "model", "program")
    new = dataclasses.asdict(found)
    rows = [row for row in rows if any(row[name] != new[name] for name in names)]
    path.write_text(json.dumps([*rows, new], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
