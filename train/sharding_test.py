"""Several devices, or several processes, do what one does: to rounding, with the real model."""

import os
import socket
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from train import sharding
from train.collectives import collectives, gathered_volumes

TOLERANCE = 1e-12

# Steps in float64 from the same start on each mesh; then everything is written out. A mesh is
# "data,fsdp,depth", and several processes use all of their devices for it. The optimizer is "sgd"
# for two steps, or one of the application's for twelve.
PROGRAM = textwrap.dedent(
    """
    import sys
    import jax, numpy as np, optax

    folder, family, optimizer, *numbers, address = sys.argv[1:9]
    batch, num_devices, num_processes, process_id = map(int, numbers)
    meshes = sys.argv[9:]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", num_devices)
    from train import distributed, sharding
    from train.losses import dice_cross_entropy_loss
    from train.optim import learning_rate_schedule, make_optimizer
    from train.state import abstract_state, initial_state
    from train.step import make_train_step
    from unetr_flax import UNETR, UNETRConfig

    if num_processes > 1:
        distributed.connect(address, num_processes, process_id)
    assert jax.device_count() == num_devices * num_processes

    remat = family == "remat"
    sizes = {"hidden_size": 8, "num_heads": 2, "mlp_dim": 8}
    if family == "monai":
        cfg = UNETRConfig.monai((32, 16, 16), 1, 3, feature_size=2, **sizes)
    else:
        cfg = UNETRConfig.reference(
            (64, 8, 8) if family == "deep" else (16, 8, 16), 1, 3, light_r=32, num_layers=4,
            dropout_rate=0.1, patch_size=(8, 8, 8), **sizes,
        )
    model = UNETR(cfg, param_dtype="float64", remat=remat, jit_blocks=True)
    clip_norm = 1e-3
    if optimizer == "sgd":
        # Not Adam, which divides gradients that are nothing but rounding by their size.
        tx, num_steps, options = optax.sgd(1e-2, momentum=0.9), 2, {}
    else:
        tx = make_optimizer(
            learning_rate_schedule(3e-3, 12, 0.25),
            weight_decay=0.1, clip_norm=clip_norm, optimizer=optimizer,
        )
        num_steps, options = 12, {"accumulate": 2, "ema_decay": 0.9}

    def steps(mesh):
        rng = np.random.default_rng(0)

        def value(x):
            if x.dtype != np.float64:
                return np.zeros(x.shape, x.dtype)
            return rng.uniform(0.5, 1, x.shape) * rng.choice([-1, 1], x.shape) / 10

        state = jax.tree.map(value, abstract_state(model, tx, sharding.replicated(mesh)))
        state = state.replace(batch_stats=jax.tree.map(np.abs, state.batch_stats))
        if optimizer != "sgd":
            state = initial_state(state.variables, tx, jax.random.key(0), averaged=True)
        placed = sharding.state_sharding(state, mesh)
        state = jax.device_put(state, placed)
        replicated = sharding.replicated(mesh)
        train_step = make_train_step(
            model, tx, dice_cross_entropy_loss, (placed, replicated), mesh=mesh, **options
        )
        losses, norms, program = [], [], None
        for _ in range(num_steps):
            # Every volume and slice has its own statistics, which are not those of the batch.
            image = rng.normal(size=(batch, *cfg.img_size, 1))
            image *= np.arange(1, batch + 1).reshape(-1, 1, 1, 1, 1)
            image += np.linspace(-1, 1, cfg.img_size[0]).reshape(-1, 1, 1, 1)
            label = rng.integers(0, 3, image.shape[:-1]).astype(np.int32)
            which, of = sharding.batch_share(mesh)
            share = slice(which * batch // of, (which + 1) * batch // of)
            given = sharding.shard_batch({"image": image[share], "label": label[share]}, mesh)
            assert given["image"].shape == image.shape
            part = batch // sharding.batch_shards(mesh), cfg.img_size[0] // mesh.shape["depth"]
            for piece in given["image"].addressable_shards:
                assert piece.data.shape == (*part, *cfg.img_size[1:], 1)
                np.testing.assert_array_equal(piece.data, image[piece.index])
            if program is None:
                program = train_step.lower(state, given).compile()
            state, metrics = program(state, given)
            for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
                assert x.sharding.is_equivalent_to(expected, x.ndim)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        assert optimizer == "sgd" or min(norms) > clip_norm, norms
        flat, _ = jax.tree_util.tree_flatten_with_path(sharding.local_copy(state))
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
        arrays |= {"losses": losses, "norms": norms}
        return program.as_text(), arrays

    for name in meshes:
        data, fsdp, depth = map(int, name.split(","))
        devices = None if num_processes > 1 else jax.devices()[: data * fsdp * depth]
        program, arrays = steps(sharding.make_mesh(fsdp, depth, devices))
        if distributed.is_main():
            np.savez(f"{folder}/{name}.npz", program=program, **arrays)

    assert distributed.any_process(process_id == num_processes - 1)
    assert not distributed.any_process(False)
    assert distributed.process_min((3 << 40) + process_id) == 3 << 40
    np.testing.assert_array_equal(
        distributed.process_sum(np.arange(3) + process_id),
        num_processes * np.arange(3) + sum(range(num_processes)),
    )
    """
)


def run(
    folder,
    meshes,
    *,
    family="reference",
    optimizer="sgd",
    batch=4,
    num_devices=1,
    num_processes=1,
):
    """Trains in separate processes; returns the arrays of each mesh and its compiled program."""
    address = ""
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
    # Fast code would take longer to compile than slow code takes to run.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    options = (family, optimizer, batch, num_devices, num_processes)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (folder, *options, i, address, *meshes))],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(num_processes)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=1500)
        assert process.returncode == 0, errors
    found = []
    for name in meshes:
        with np.load(folder / f"{name}.npz") as arrays:
            found.append((dict(arrays), str(arrays["program"])))
            del found[-1][0]["program"]
    return found


def assert_same(found, expected, tolerance=TOLERANCE, floor=0.0):
    """Checks that arrays differ by no more than a share of the largest number, or of `floor`."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        size = max(np.abs(array).max(), floor)
        assert np.abs(found[name] - array).max() <= tolerance * size, name


def assert_no_volume_is_gathered(arrays, program, volumes, *, shares_volumes=True):
    """Checks that volumes are exchanged one slice at a time, and gathered never.

    Args:
      arrays: the arrays of a state, parameters among them.
      program: text of the compiled program.
      volumes: number of volumes of each device.
      shares_volumes: whether devices share volumes, so that slices must be exchanged.
    """
    parameters = {array.shape for array in arrays.values()}
    # The 1x1x1 kernels of concatenations are cut in two; fsdp splits each half, and gathers it.
    halves = {(s[3] // 2, s[4]) for s in parameters if len(s) == 5 and s[:3] == (1, 1, 1)}
    kernels = {(rows // 2, columns) for rows, columns in halves}
    slices = [x for x in collectives(program, "collective-permute") if x not in kernels]
    assert bool(slices) == shares_volumes
    assert all(len(shape) == 5 and shape[1] == 1 for shape in slices)
    (position,) = (x for name, x in arrays.items() if "params['encoder']['embedding']['pos" in name)
    assert not gathered_volumes(program, volumes * position.size, parameters | halves)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), ["1,1,1", "2,2,2"], batch=8, num_devices=8)


def test_eight_devices_equal_one(one_process):
    (expected, _), (found, program) = one_process
    assert any("batch_stats" in name and "var" in name for name in found)
    assert_same(found, expected)
    assert_no_volume_is_gathered(found, program, volumes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "batch", "meshes"),
    [
        ("reference", 1, ["1,1,2"]),
        ("reference", 8, ["8,1,1", "1,8,1", "4,1,2"]),
        ("monai", 1, ["1,1,2"]),
        ("monai", 4, ["2,1,1", "1,2,1", "1,1,2", "2,2,2"]),
        ("remat", 2, ["1,2,1", "1,1,2"]),
    ],
)
def test_each_axis_and_family_equals_one_device(family, batch, meshes, tmp_path):
    found = run(tmp_path, ["1,1,1", *meshes], family=family, batch=batch, num_devices=8)
    (expected, _), *several = found
    for name, (arrays, program) in zip(meshes, several, strict=True):
        assert_same(arrays, expected)
        data, fsdp, depth = map(int, name.split(","))
        if fsdp * depth > 1:
            volumes = batch // (data * fsdp)
            assert_no_volume_is_gathered(arrays, program, volumes, shares_volumes=depth > 1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trajectories_of_the_application_equal_one_device(optimizer, tmp_path):
    meshes = ["1,1,1", "8,1,1", "1,8,1", "1,1,8", "2,2,2"]
    sizes = {"family": "deep", "batch": 16, "num_devices": 8}
    (expected, _), *several = run(tmp_path, meshes, optimizer=optimizer, **sizes)
    assert any(".average" in name for name in expected)
    for arrays, _ in several:
        # Moments of gradients that are zero are nothing but rounding, hence the floor.
        assert_same(arrays, expected, tolerance=1e-9, floor=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "num_devices", "meshes"),
    # With one device each, two processes share every volume.
    [(2, 1, ["2,1,1", "1,2,1", "1,1,2"]), (4, 2, ["2,2,2", "4,1,2", "1,8,1"])],
)
def test_several_processes_equal_one(one_process, num_processes, num_devices, meshes, tmp_path):
    (expected, _), _ = one_process
    sizes = {"num_processes": num_processes, "num_devices": num_devices}
    for arrays, _ in run(tmp_path, meshes, batch=8, **sizes):
        assert_same(arrays, expected)


def test_policy_splits_large_arrays_along_their_largest_axis():
    params = {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8), "position_embedding": 0}
    params["position_embedding"] = np.zeros((1, 6, 6))
    tree = {"params": params, "opt_state": [params], "step": np.zeros(())}

    def specs(fsdp):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: sharding.parameter_spec(path, x.shape, fsdp), tree
        )

    found = specs(2)
    assert found["params"]["kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert found["params"]["position_embedding"] == PartitionSpec(None, None, "fsdp")
    assert found["params"]["bias"] == found["step"] == PartitionSpec()
    assert found["opt_state"][0] == found["params"]
    assert specs(3)["params"]["kernel"] == PartitionSpec(None, "fsdp", None, None)
    # Nothing is divisible.
    assert specs(5)["params"]["kernel"] == PartitionSpec()
    assert set(jax.tree.leaves(specs(1))) == {PartitionSpec()}


def test_meshes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ValueError, match=r"--fsdp 2 --depth-shards 1: .* devices, 1"):
        sharding.make_mesh(fsdp=2, devices=jax.devices()[:1])


def test_a_batch_that_cannot_be_split_is_refused_with_what_helps():
    mesh = jax.sharding.AbstractMesh((8, 1, 1), sharding.AXES)
    message = (
        r"^--batch-size 2: must be divisible by the number of devices, 8; use fewer devices, let "
        r"several share a volume by --depth-shards, or start a new run with another --batch-size$"
    )
    with pytest.raises(ValueError, match=message):
        sharding.check_fits(mesh, 2, 1, None)
    sharding.check_fits(jax.sharding.AbstractMesh((2, 1, 4), sharding.AXES), 2, 1, 8)


@pytest.mark.parametrize(
    ("processes", "shape", "shares"),
    [
        # The number of the process of each device, in the order of the mesh.
        ([0, 1], (2, 1, 1), [(0, 2), (1, 2)]),
        ([0, 1], (1, 1, 2), [(0, 1), (0, 1)]),
        ([0, 0, 1, 1], (2, 1, 2), [(0, 2), (1, 2)]),
        ([0, 1, 2, 3], (1, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 0, 0, 0], (1, 4, 1), [(0, 1)]),
    ],
)
def test_processes_load_what_their_devices_have(monkeypatch, processes, shape, shares):
    devices = [types.SimpleNamespace(process_index=i) for i in processes]
    mesh = types.SimpleNamespace(
        devices=np.array(devices, object).reshape(shape),
        shape=dict(zip(sharding.AXES, shape, strict=True)),
    )
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.batch_share(mesh) == share


def test_shares_of_a_batch_that_are_not_equal_are_refused(monkeypatch):
    devices = [types.SimpleNamespace(process_index=i) for i in (0, 1, 0)]
    mesh = types.SimpleNamespace(
        devices=np.array(devices, object).reshape(3, 1, 1),
        shape={"data": 3, "fsdp": 1, "depth": 1},
    )
    with pytest.raises(ValueError, match=r"parts \[0, 2\] of 3"):
        sharding.batch_share(mesh)
