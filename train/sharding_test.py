"""Several devices, or several processes, do what one does: to rounding, with the real model."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

TOLERANCE = 1e-12

# Two steps in float64 from the same start on the devices at hand; then everything is written out.
PROGRAM = textwrap.dedent(
    """
    import sys
    import jax, numpy as np, optax

    path, num_devices, process_id, address, *img_size = sys.argv[1:]
    num_devices, process_id = int(num_devices), int(process_id)
    img_size = tuple(map(int, img_size))
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", num_devices)
    from train import distributed, sharding
    from train.losses import dice_cross_entropy_loss
    from train.state import abstract_state
    from train.step import make_train_step
    from unetr_flax import UNETR, UNETRConfig

    num_processes = 1
    if address:
        num_processes = 2
        distributed.connect(address, num_processes, process_id)
    assert jax.device_count() == num_devices * num_processes

    cfg = UNETRConfig.reference(
        img_size, 1, 3, light_r=32, hidden_size=8, num_layers=4, num_heads=2, mlp_dim=8,
        dropout_rate=0.1,
    )
    model = UNETR(cfg, param_dtype="float64")
    # Not Adam, which divides gradients that are nothing but rounding by their size.
    tx = optax.sgd(1e-2, momentum=0.9)
    mesh = sharding.make_mesh()
    replicated = sharding.replicated(mesh)
    rng = np.random.default_rng(0)

    def value(x):
        if x.dtype != np.float64:
            return np.zeros(x.shape, x.dtype)
        return rng.uniform(0.5, 1, x.shape) * rng.choice([-1, 1], x.shape) / 10

    state = jax.tree.map(value, abstract_state(model, tx, replicated))
    state = state.replace(batch_stats=jax.tree.map(np.abs, state.batch_stats))
    state = jax.device_put(state, replicated)
    train_step = make_train_step(model, tx, dice_cross_entropy_loss, replicated)
    losses = []
    for _ in range(2):
        # Every volume has its own statistics, so that those of a shard are not those of the batch.
        image = rng.normal(size=(*img_size, 1, 4)) * [1, 2, 3, 4] + [0, 1, 0, -1]
        image = np.moveaxis(image, -1, 0)
        label = rng.integers(0, 3, image.shape[:-1]).astype(np.int32)
        share = slice(process_id * 4 // num_processes, (process_id + 1) * 4 // num_processes)
        batch = sharding.shard_batch({"image": image[share], "label": label[share]}, mesh)
        assert len(batch["image"].addressable_shards) == num_devices
        assert batch["image"].shape == image.shape
        state, metrics = train_step(state, batch)
        assert all(x.sharding.is_equivalent_to(replicated, x.ndim) for x in jax.tree.leaves(state))
        losses.append(float(metrics["loss"]))

    assert distributed.any_process(process_id == num_processes - 1)
    assert not distributed.any_process(False)
    np.testing.assert_array_equal(
        distributed.process_sum(np.arange(3) + process_id),
        num_processes * np.arange(3) + num_processes - 1,
    )
    kept = sharding.local_copy(state)
    flat, _ = jax.tree_util.tree_flatten_with_path(kept)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
    if distributed.is_main():
        np.savez(path, losses=losses, **arrays)
    """
)


def run(path, img_size, num_devices=1, num_processes=1):
    """Trains in separate processes, and returns the arrays that the main process has written."""
    address = ""
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
    # Fast code would take longer to compile than slow code takes to run.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (path, num_devices, i, address, *img_size))],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(num_processes)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    with np.load(path) as arrays:
        return dict(arrays)


# Two axes compile in half the time of three, and sharding does not depend on their number.
@pytest.fixture(
    scope="module", params=[(16, 32), pytest.param((16, 32, 16), marks=pytest.mark.slow)], ids=str
)
def one_device(request, tmp_path_factory):
    return request.param, run(tmp_path_factory.mktemp("one") / "one.npz", request.param)


@pytest.mark.parametrize("several", [{"num_devices": 2}, {"num_processes": 2}], ids=str)
def test_several_equal_one(several, one_device, tmp_path):
    img_size, expected = one_device
    actual = run(tmp_path / "several.npz", img_size, **several)
    assert actual.keys() == expected.keys()
    assert any("batch_stats" in name and "var" in name for name in actual)
    for name, array in expected.items():
        assert np.abs(actual[name] - array).max() <= TOLERANCE * np.abs(array).max(), name
