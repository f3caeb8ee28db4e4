"""A run goes on with other devices: from one to a mesh of several, and back."""

import os
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import functools, sys, types
    from pathlib import Path
    import jax, numpy as np, optax
    from jax.sharding import PartitionSpec

    folder = Path(sys.argv[1])
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    from train import sharding
    from train.checkpoint import Checkpoints
    from train.losses import dice_cross_entropy_loss
    from train.stand_in import Small
    from train.state import abstract_state, create_state
    from train.step import make_train_step

    model = Small(types.SimpleNamespace(img_size=(4, 2, 3), in_channels=2, out_channels=4),
                  param_dtype="float64")
    tx = optax.sgd(1e-1, momentum=0.9)
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.normal(size=(4, 4, 2, 3, 2)), "label": rng.integers(0, 4, (4, 4, 2, 3))}
        for _ in range(3)
    ]
    one = sharding.make_mesh(devices=jax.devices()[:1])
    four = sharding.make_mesh(2, 2, jax.devices()[:4])
    eight = sharding.make_mesh(2, 2)
    specs = set()

    @functools.cache
    def step_on(mesh):
        abstract = abstract_state(model, tx, sharding.replicated(mesh))
        abstract = sharding.with_sharding(abstract, mesh)
        placed = sharding.state_sharding(abstract, mesh)
        results = placed, sharding.replicated(mesh)
        step = make_train_step(model, tx, dice_cross_entropy_loss, results, mesh=mesh)
        return abstract, placed, step

    def train(meshes, name):
        '''Takes a step on each mesh; a checkpoint carries the state from one to the next.'''
        losses = []
        for step, (mesh, batch) in enumerate(zip(meshes, batches)):
            abstract, placed, train_step = step_on(mesh)
            checkpoints = Checkpoints(folder / name)
            if checkpoints.last_step is None:
                state = create_state(model, tx, 0, placed)
            else:
                state, resume_state = checkpoints.restore_last(abstract)
                assert resume_state == {"step": step}
            kernel = state.params["Dense_0"]["kernel"]
            assert kernel.sharding == placed.params["Dense_0"]["kernel"]
            specs.add(kernel.sharding.spec)
            state, metrics = train_step(state, sharding.shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            checkpoints.save_last(state, {"step": step + 1})
            checkpoints.close()
        return losses, sharding.local_copy(state)

    expected, last = train([one] * 3, "straight")
    assert len(set(expected)) == 3
    for name, meshes in {"there": [one, four, one], "back": [four, one, eight]}.items():
        losses, state = train(meshes, name)
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), state, last)
    # Some of the meshes did split the kernel.
    assert specs == {PartitionSpec(), PartitionSpec(None, "fsdp")}
    """
)


def test_checkpoints_of_one_device_go_on_on_several_and_back(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0, result.stderr
