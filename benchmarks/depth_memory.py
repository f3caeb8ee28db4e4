"""python -m benchmarks.depth_memory: memory per device of a training step that devices share.

The step is compiled for CPU devices, of which XLA makes as many as it is told, and not run. For the
TPU's compiler see `benchmarks.tpu_compile --depth-shards`.
"""

import dataclasses
import sys

import jax
import optax
import tyro

from train.collectives import collectives, gathered_volumes
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

HEAD = """\
| model | devices | intermediate results | state and batch | slices exchanged | maps gathered |
| --- | --- | --- | --- | --- | --- |"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile a training step of one volume for CPU devices that share its depth."""

    edges: tuple[int, ...] = (96, 128)
    """Voxels per axis."""

    depth_shards: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; those that do not divide the patches along depth are left out."""

    families: tuple[str, ...] = ("reference", "monai")
    """reference (with light_r 4) and monai."""


def row(family: str, edge: int, depth_shards: int) -> str:
    """Compiles a step and formats its figures as a row of the table."""
    size = (edge,) * 3
    monai = family == "monai"
    cfg = UNETRConfig.monai(size, 1, 4) if monai else UNETRConfig.reference(size, 1, 4, 4)
    model, tx = UNETR(cfg, jit_blocks=True), optax.adamw(1e-3)
    mesh = make_mesh(1, depth_shards, jax.devices()[:depth_shards])
    state = with_sharding(abstract_state(model, tx, replicated(mesh)), mesh)
    results = state_sharding(state, mesh), replicated(mesh)
    step = make_train_step(model, tx, dice_cross_entropy_loss, results, mesh=mesh)
    compiled = step.lower(state, abstract_batch(cfg, 1, batch_sharding(mesh))).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    parameters = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    gathered = gathered_volumes(program, cfg.num_patches * cfg.hidden_size, parameters)
    return (
        f"| {family}, {edge}^3 | {depth_shards} | {memory.temp_size_in_bytes / 2**30:.2f} GiB "
        f"| {memory.argument_size_in_bytes / 2**30:.2f} GiB "
        f"| {len(collectives(program, 'collective-permute'))} | {len(gathered)} |"
    )


def main(args: list[str]) -> int:
    """Runs the command; returns the exit status."""
    options = tyro.cli(Options, args=args, prog="python -m benchmarks.depth_memory")
    jax.config.update("jax_num_cpu_devices", max(options.depth_shards))
    print(HEAD, flush=True)
    for family in options.families:
        for edge in options.edges:
            for shards in options.depth_shards:
                # Patches have 16 voxels along each axis.
                if edge // 16 % shards == 0:
                    print(row(family, edge, shards), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
