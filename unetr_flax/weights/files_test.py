import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from unetr_flax.weights import CheckpointError, read_state_dict, write_state_dict
from unetr_flax.weights.torch_files import to_tensor

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
ARRAYS = {
    "half": RNG.standard_normal((3, 2)).astype(np.float16),
    "brain": RNG.standard_normal((2, 3, 4)).astype(jnp.bfloat16),
    "single": RNG.standard_normal(()).astype(np.float32),
    "double": RNG.standard_normal((5,)),
}
COUNTER = {"norm.num_batches_tracked": np.array(7, np.int64)}
ENDINGS = [".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".PT"]


def bits(value) -> bytes:
    if hasattr(value, "detach"):
        import torch

        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.asarray(value).tobytes()


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key in expected:
        assert str(found[key].dtype).removeprefix("torch.") == str(expected[key].dtype)
        assert tuple(found[key].shape) == expected[key].shape
        assert bits(found[key]) == bits(expected[key])


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_bit_for_bit(tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    write_state_dict(path, ARRAYS)
    found = read_state_dict(path)
    # safetensors sorts by size of the numbers.
    assert_same({key: found.state_dict[key] for key in ARRAYS}, ARRAYS)
    assert (found.description, found.metadata) == ("state dict", {})
    assert os.listdir(tmp_path) == [path.name]


def test_counters_are_written_and_not_read(tmp_path):
    torch = pytest.importorskip("torch")
    given = {**ARRAYS, **COUNTER}
    write_state_dict(tmp_path / "a.safetensors", given)
    write_state_dict(tmp_path / "a.pt", given)
    plain = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert_same({key: plain[key] for key in given}, given)
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), given)
    for name in ("a.safetensors", "a.pt"):
        found = read_state_dict(tmp_path / name)
        assert found.state_dict.keys() == ARRAYS.keys()
        assert found.description == "state dict, 1 counter dropped"


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint16, np.uint32, np.int64, np.uint64])
def test_counters_and_ignored_keys_may_be_of_any_dtype(tmp_path, dtype):
    given = {**ARRAYS, "n_averaged": np.array(3, dtype), "best": np.ones(2, dtype)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(given))
    found = read_state_dict(path, ["best"])
    assert_same({key: found.state_dict[key] for key in ARRAYS}, ARRAYS)
    assert found.description == "state dict, 1 counter dropped, 1 key ignored"
    with pytest.raises(CheckpointError, match=f"best is {np.dtype(dtype).name}, must be one of"):
        read_state_dict(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_writes_tensors_jax_arrays_and_views(tmp_path, ending):
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = {
        "tensor": to_tensor(ARRAYS["brain"]).requires_grad_(),
        "jax": jnp.asarray(ARRAYS["brain"]),
        "transposed": wide.T,
        "reversed": wide[::-1, ::2],
        "read-only": np.broadcast_to(np.float32(2), (2, 3)),
        "tied": wide,
        "transposed tensor": to_tensor(wide).T,
    }
    path = tmp_path / f"weights{ending}"
    write_state_dict(path, given)
    found = read_state_dict(str(path)).state_dict
    expected = {
        "tensor": ARRAYS["brain"],
        "jax": ARRAYS["brain"],
        "transposed": wide.T,
        "reversed": wide[::-1, ::2],
        "read-only": np.full((2, 3), 2, np.float32),
        "tied": wide,
        "transposed tensor": wide.T,
    }
    assert_same({key: found[key] for key in expected}, expected)


def test_a_checkpoint_of_lightning(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {f"vit.blocks.{key}": value for key, value in ARRAYS.items()}
    state_dict = {f"model.module.{key}": to_tensor(value) for key, value in arrays.items()}
    state_dict |= {"loss.weight": torch.ones(2), "model.n_averaged": torch.tensor(3)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state_dict, "epoch": 3, "hyper_parameters": {"lr": 1e-3}}, path)
    found = read_state_dict(path, ignore=["loss.*"])
    assert_same(found.state_dict, arrays)
    assert found.description == (
        "state_dict of a checkpoint, prefix 'model.module.' removed, 1 counter dropped, "
        "1 key ignored"
    )


def test_parameters_and_pending_negations_become_plain(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    assert values.is_neg()
    torch.save({"p": torch.nn.Parameter(torch.ones(2)), "n": values}, tmp_path / "a.pt")
    found = read_state_dict(tmp_path / "a.pt").state_dict
    assert all(type(value) is torch.Tensor for value in found.values())
    assert not found["p"].requires_grad
    np.testing.assert_array_equal(found["n"].numpy(), [0, -1, -2])


def test_tensors_that_share_memory(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(12.0)
    torch.save({"first": whole[:5], "last": whole[7:]}, tmp_path / "a.pt")
    found = read_state_dict(tmp_path / "a.pt").state_dict
    assert_same(found, {"first": whole[:5].numpy(), "last": whole[7:].numpy()})


def test_checksums_that_were_not_computed(tmp_path):
    torch = pytest.importorskip("torch")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_state_dict(tmp_path / "a.pt").state_dict, {"a": np.ones(3, np.float32)})


def test_metadata_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3)}, path, {"format": "pt", "é": "ü"})
    assert read_state_dict(path).metadata == {"format": "pt", "é": "ü"}


@pytest.mark.parametrize("size", [0x0280, 0x0480, 0x4B50])
def test_safetensors_whose_size_looks_like_another_format(tmp_path, size):
    data = safetensors.numpy.save({"a": np.ones(3)})
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip().ljust(size)
    (tmp_path / "a").write_bytes(size.to_bytes(8, "little") + header + data[end:])
    assert_same(read_state_dict(tmp_path / "a").state_dict, {"a": np.ones(3)})


@pytest.mark.parametrize(
    ("name", "state_dict", "message"),
    [
        ("a.txt", ARRAYS, "a.txt: must end in .safetensors, .pt, .pth, .ckpt, .bin"),
        ("no/a.pt", ARRAYS, "no folder"),
        ("a.pt", {"a": np.array([1, np.nan])}, "not written, a: 1 of 2 numbers are NaN"),
        ("a.pt", {"a": np.array([1, 2])}, "not written, a is int64"),
        ("a.pt", {"a": np.array([None])}, "not written, a is object"),
        ("a.pt", {}, "holds nothing"),
        ("a.pt", {"model": ARRAYS}, "must be a bare state dict"),
        ("a.pt", {"module.vit.blocks.0": np.ones(2)}, "must be a bare state dict"),
    ],
)
def test_refuses_to_write_what_it_would_not_read(tmp_path, name, state_dict, message):
    with pytest.raises(CheckpointError) as error:
        write_state_dict(tmp_path / name, state_dict)
    assert message in str(error.value)
    assert not os.listdir(tmp_path)


KILL = """
import os, sys
import numpy as np
from unetr_flax.weights import write_state_dict
os.{function} = lambda *_: os._exit(9)
write_state_dict(sys.argv[1], {{"a": np.zeros(3, np.float32)}})
"""


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_killed_write_leaves_the_old_file(tmp_path, ending, function):
    path = tmp_path / f"a{ending}"
    old = {"a": np.arange(4.0)}
    write_state_dict(path, old)
    code = KILL.format(function=function)
    run = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert run.returncode == 9
    assert_same(read_state_dict(path).state_dict, old)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    path = tmp_path / "a.safetensors"
    write_state_dict(path, {"a": np.arange(4.0)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_state_dict(path, {"a": np.zeros(3)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert_same(read_state_dict(path).state_dict, {"a": np.arange(4.0)})


def test_only_files_of_torch_need_torch(tmp_path):
    write_state_dict(tmp_path / "a.pt", ARRAYS)
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from unetr_flax.weights import CheckpointError, read_state_dict, write_state_dict
write_state_dict("a.safetensors", {"a": np.ones(3)})
assert read_state_dict("a.safetensors").state_dict["a"].sum() == 3
for use in (lambda: read_state_dict("a.pt"), lambda: write_state_dict("b.pt", {"a": np.ones(3)})):
    try:
        use()
    except CheckpointError as error:
        assert "pip install 'unetr-flax[torch]'" in str(error)
    else:
        raise SystemExit("not refused")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]
