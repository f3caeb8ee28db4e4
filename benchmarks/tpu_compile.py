"""Compiles the model with the TPU's compiler, without a TPU, and prints the compiler's figures.

It needs the package libtpu. Run
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.tpu_compile
in one process at a time, as the compiler holds a lock. The command fails if a program needs more
memory than `PROMISES` gives it or, without a promise, than its chip has, or if its chips gather
feature maps. Computation is bfloat16, parameters are float32, the optimizer is AdamW.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import topologies
from rich.console import Console

from train.collectives import Shape, collectives, gathered_volumes
from train.losses import dice_cross_entropy_loss
from train.sharding import (
    batch_sharding,
    make_mesh,
    replicated,
    state_sharding,
    with_sharding,
)
from train.state import abstract_state
from train.step import abstract_batch, make_train_step
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.inference.predictor import make_predict

# Number of chips in each topology below.
ALL_CHIPS = 4

# GiB of one chip. The compiler itself refuses programs that need more than it leaves to programs.
CHIPS = {"v5e:2x2": 16, "v5p:2x2x1": 95, "v6e:2x2": 32}
FAMILIES = ("reference", "monai")
KINDS = ("forward", "step", "step-remat")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the model for one chip, or for several that share its batch.

    Attributes:
      topology: kind of chip, a key of `CHIPS`.
      family: family of the model, one of `FAMILIES`.
      light_r: divisor of the reference decoder's widths; 1 for MONAI's.
      edge: voxels per axis.
      batch: volumes.
      kind: one of `KINDS`: "forward", "step" (of training), or "step-remat", which computes
        activations again in the backward pass.
      chips: number of chips, 1, 2 or `ALL_CHIPS`.
      fsdp: chips that share the parameters, see `train.sharding`.
      depth_shards: chips that share each volume.

    Raises:
      ValueError: if there is no such program.
    """

    topology: str
    family: str
    light_r: float
    edge: int
    batch: int
    kind: str
    chips: int = 1
    fsdp: int = 1
    depth_shards: int = 1

    def __post_init__(self) -> None:
        fields = (("topology", CHIPS), ("family", FAMILIES), ("kind", KINDS))
        for field, allowed in fields:
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} {value!r}: must be one of {', '.join(allowed)}")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch}: must be at least 1")
        if self.chips not in (1, 2, ALL_CHIPS) or self.chips % (self.fsdp * self.depth_shards):
            raise ValueError(
                f"chips {self.chips}: must be 1, 2 or {ALL_CHIPS}, and divisible by fsdp "
                f"{self.fsdp} times depth_shards {self.depth_shards}"
            )
        if self.batch % (shares := self.chips // self.depth_shards):
            raise ValueError(f"batch {self.batch}: must be divisible by {shares} shares of it")
        if self.kind == "forward" and self.fsdp * self.depth_shards > 1:
            raise ValueError("kind 'forward': must be without fsdp and depth_shards")
        if self.family == "monai" and self.light_r != 1:
            raise ValueError(f"light_r {self.light_r:g}: must be 1 for monai")
        _ = self.config

    @property
    def config(self) -> UNETRConfig:
        """Configuration of the model, for one channel and four classes."""
        size = (self.edge,) * 3
        if self.family == "monai":
            return UNETRConfig.monai(size, 1, 4)
        return UNETRConfig.reference(size, 1, 4, self.light_r)

    @property
    def room(self) -> float:
        """GiB of each chip that the program may need."""
        return PROMISES.get(self, CHIPS[self.topology])

    def __str__(self) -> str:
        width = f" light_r {self.light_r:g}" if self.family == "reference" else ""
        shared = f" on {self.chips} chips" if self.chips > 1 else ""
        shared += f", fsdp {self.fsdp}" if self.fsdp > 1 else ""
        shared += f", depth {self.depth_shards}" if self.depth_shards > 1 else ""
        return (
            f"{self.topology} | {self.family}{width}, {self.edge}^3, batch {self.batch}{shared} "
            f"| {self.kind}"
        )


# GiB of each chip that programs may need, arguments and results included.
PROMISES = {
    Program("v5e:2x2", "reference", 4.0, 96, 1, "step"): 2,
    # As much as one chip needs for one volume, as chips exchange sums and never volumes.
    Program("v5e:2x2", "reference", 4.0, 96, 4, "step", chips=4): 2,
    # One chip needs 2.5 for the whole volume.
    Program("v5e:2x2", "reference", 4.0, 128, 1, "step", chips=4, depth_shards=4): 1.8,
    Program("v5e:2x2", "reference", 4.0, 224, 1, "step-remat"): 4.5,
    Program("v5e:2x2", "reference", 1.0, 224, 1, "forward"): 5,
    Program("v5e:2x2", "reference", 1.0, 224, 1, "step-remat"): 11,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the model with the TPU's compiler, without a TPU, and print its figures."""

    topologies: tuple[str, ...] = ("v5e:2x2",)
    """Kinds of chips: v5e:2x2, v5p:2x2x1, v6e:2x2."""

    edges: tuple[int, ...] = (96,)
    """Voxels per axis."""

    batch: tuple[int, ...] = (1,)
    """Volumes."""

    chips: int = 1
    """Number of chips, 1, 2 or 4, that share the batch, parameters and volumes."""

    fsdp: int = 1
    """Chips that share the parameters."""

    depth_shards: int = 1
    """Chips that share each volume."""

    light_r: float | None = None
    """Divisor of the reference decoder's widths; 4 if left out."""

    family: str = "reference"
    """reference or monai."""

    kinds: tuple[str, ...] = ("forward", "step")
    """forward, step (of training), step-remat."""

    promised: bool = False
    """Compile all promised programs, which takes an hour, instead of those named above."""

    out: Path = Path("runs/tpu_compile.json")
    """File for the figures, written after every program; older figures of others are kept."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """The compiler's figures of one program, for each chip.

    Attributes:
      total: bytes of intermediate results, arguments and results; donated ones count once.
      temporary: the part of `total` that is intermediate results.
      flops: floating-point operations; the body of a loop counts once.
      traffic: bytes read and written in the chip's memory; the body of a loop counts once.
      seconds: seconds that compiling took.
      gathered: number of feature maps that are gathered on a chip.
      exchanged: the different shapes of arrays that chips send to their neighbors.
    """

    total: int
    temporary: int
    flops: float
    traffic: float
    seconds: float
    gathered: int = 0
    exchanged: tuple[Shape, ...] = ()


def chosen(options: Options) -> list[Program]:
    """Lists the programs to compile.

    Raises:
      ValueError: if the value of an option is not allowed.
    """
    if options.promised:
        return list(PROMISES)
    light_r = options.light_r
    if light_r is None:
        light_r = 1.0 if options.family == "monai" else 4.0
    return [
        Program(
            topology,
            options.family,
            light_r,
            edge,
            batch,
            kind,
            options.chips,
            options.fsdp,
            options.depth_shards,
        )
        for topology in options.topologies
        for edge in options.edges
        for batch in options.batch
        for kind in options.kinds
    ]


def compile_program(
    topology: str,
    cfg: UNETRConfig,
    batch: int,
    kind: str,
    chips: int = 1,
    fsdp: int = 1,
    depth_shards: int = 1,
) -> Figures:
    """Compiles a program; the arguments are the fields of `Program`."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    mesh = make_mesh(fsdp, depth_shards, devices)
    model = UNETR(cfg, dtype=jnp.bfloat16, remat=kind == "step-remat", jit_blocks=True)
    update = optax.adamw(1e-3)
    data = abstract_batch(cfg, batch, batch_sharding(mesh))
    state = with_sharding(abstract_state(model, update, replicated(mesh)), mesh)
    start = time.perf_counter()
    if kind == "forward":
        lowered = make_predict(model, "tpu").lower(state.variables, data["image"])
    else:
        results = state_sharding(state, mesh), replicated(mesh)
        step = make_train_step(
            model, update, dice_cross_entropy_loss, results, platform="tpu", mesh=mesh
        )
        lowered = step.lower(state, data)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    tokens = cfg.num_patches * cfg.hidden_size * (batch * depth_shards // chips)
    parameters = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    text = compiled.as_text()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Figures(
        total=memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        flops=cost["flops"],
        traffic=cost["bytes accessed"],
        seconds=seconds,
        gathered=len(gathered_volumes(text, tokens, parameters)),
        exchanged=tuple(sorted(set(collectives(text, "collective-permute")))),
    )


def main(args: list[str]) -> int:
    """Runs the command; returns 0, or 1 if a program does not fit, or 2 for bad options."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.tpu_compile")
    console = Console()
    try:
        programs = chosen(options)
    except ValueError as error:
        print(f"tpu_compile: {error}", file=sys.stderr)
        return 2
    console.print(HEAD, highlight=False, soft_wrap=True)
    failures = []
    for program in programs:
        try:
            found = compile_program(
                program.topology,
                program.config,
                program.batch,
                program.kind,
                program.chips,
                program.fsdp,
                program.depth_shards,
            )
        except jax.errors.JaxRuntimeError as error:
            # The compiler itself refuses programs that do not fit the chip.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row = f"| {program} | {str(error).splitlines()[0][:200]} |"
            failures.append(f"{program}: more than the chip has")
        else:
            _keep(options.out, program, found)
            row = line(program, found)
            if found.total > program.room * 2**30:
                total = f"{found.total / 2**30:.2f}"
                failures.append(f"{program}: {total} GiB, must fit {program.room:g} GiB")
            if found.gathered:
                failures.append(f"{program}: gathers {found.gathered} feature maps")
        console.print(row, highlight=False, soft_wrap=True)
    for each in failures:
        print(f"tpu_compile: {each}", file=sys.stderr)
    return 1 if failures else 0


HEAD = """\
| chip | model | program | memory | of which temporary | operations | traffic | compiled in |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(program: Program, found: Figures) -> str:
    """Formats the figures of a program as a row of a Markdown table."""
    return (
        f"| {program} | {found.total / 2**30:.2f} of {program.room:g} GiB "
        f"| {found.temporary / 2**30:.2f} GiB | {found.flops / 1e12:.2f} T "
        f"| {found.traffic / 2**30:.1f} GiB | {found.seconds:.0f} s |"
    )


def _keep(path: Path, program: Program, found: Figures) -> None:
    """Adds figures to a file and removes older ones of the same program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    which = dataclasses.asdict(program)
    rows = [row for row in rows if row["program"] != which]
    new = {"program": which, **dataclasses.asdict(found)}
    path.write_text(json.dumps([*rows, new], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
