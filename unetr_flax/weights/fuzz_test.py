"""Damaged and malicious checkpoints: each is refused by one clear line, and none is executed.

`python -m unetr_flax.weights.fuzz_test` prints what is said of each.
"""

import collections
import io
import json
import os
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import (
    CheckpointError,
    WeightsError,
    from_torch,
    read_state_dict,
    to_torch,
)

torch = pytest.importorskip("torch")

CFG = UNETRConfig.reference((16, 32, 16), 1, 2, 16, hidden_size=8, num_heads=2, num_layers=4)
KEY = "transformer.layers.1.1.fn.3.weight"


def good_state_dict() -> dict[str, np.ndarray]:
    shapes = abstract_variables(UNETR(CFG))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    return to_torch(variables, CFG)


GOOD = good_state_dict()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x)


def tensors() -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in GOOD.items()}


def torch_bytes(obj, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **options)
    return buffer.getvalue()


def changed(key: str, change) -> dict[str, np.ndarray]:
    return {**GOOD, key: change(GOOD[key])}


def poisoned(value: float) -> dict[str, np.ndarray]:
    array = GOOD[KEY].copy()
    array[3, 5] = value
    return {**GOOD, KEY: array}


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {new if key == old else key: value for key, value in GOOD.items()}


def without(key: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in GOOD.items() if k != key}


def header(change) -> bytes:
    """Returns the good file of safetensors with another header."""
    data = safetensors.numpy.save(GOOD)
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    change(entries)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def overlapping(entries):
    entries[KEY]["data_offsets"] = next(
        entry["data_offsets"]
        for key, entry in entries.items()
        if key != KEY and entry["shape"] == [32, 8]
    )


def larger(entries):
    entries[KEY]["shape"] = [2**40, 2**20]


def archive(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, data in records.items():
            out.writestr(name, data)
    return buffer.getvalue()


def repacked(change, method=zipfile.ZIP_STORED) -> bytes:
    """Returns the good file of torch.save with changed records."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes(tensors()))) as old,
        zipfile.ZipFile(buffer, "w", method) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    # torch.jit warns that it is deprecated.
    with pytest.warns():
        torch.jit.save(torch.jit.script(Module()), buffer)
    return buffer.getvalue()


def stretched() -> torch.Tensor:
    """Terabytes by its shape, one number in memory."""
    return torch.ones(1).expand(2**20, 2**21)


def flipped(text: bytes) -> bytes:
    """Returns the good file of torch.save with one bit of a record changed."""
    data = bytearray(torch_bytes(tensors()))
    data[bytes(data).index(text)] ^= 1
    return bytes(data)


class Odd(torch.nn.Parameter):
    """A parameter whose state hides a method."""

    def __reduce_ex__(self, protocol):
        state = {"untyped_storage": 5}
        hooks = collections.OrderedDict()
        return torch._utils._rebuild_parameter_with_state, (self.data, True, hooks, state)


LEGACY = {"_use_new_zipfile_serialization": False}
SAVE = safetensors.numpy.save
DAMAGED = "damaged safetensors"

# Name: suffix, bytes of the file, part of the message. `marker` is a path that no file may make.
TABLE = {
    "empty": (".pt", lambda _: b"", "an empty file"),
    "empty safetensors": (".safetensors", lambda _: b"", DAMAGED),
    "random": (".pt", lambda _: np.random.default_rng(1).bytes(5000), "neither"),
    "random safetensors": (
        ".safetensors",
        lambda _: np.random.default_rng(1).bytes(5000),
        DAMAGED,
    ),
    "random after the zip magic": (
        ".pt",
        lambda _: b"PK\x03\x04" + np.random.default_rng(2).bytes(5000),
        "damaged zip",
    ),
    "random after the pickle magic": (
        ".pt",
        lambda _: b"\x80\x02" + np.random.default_rng(3).bytes(5000),
        "torch.save",
    ),
    "text": (".pt", lambda _: b"<html>404 Not Found</html>", "neither"),
    "LFS pointer": (".safetensors", lambda _: b"version https://git-lfs", DAMAGED),
    "truncated to 5": (".pt", lambda _: torch_bytes(tensors())[:5], "damaged zip"),
    "truncated to 1000": (".pt", lambda _: torch_bytes(tensors())[:1000], "damaged zip"),
    "truncated by 100": (".pt", lambda _: torch_bytes(tensors())[:-100], "damaged zip"),
    "legacy truncated to 3": (".pt", lambda _: torch_bytes(tensors(), **LEGACY)[:3], "torch.save"),
    "legacy truncated to 2000": (
        ".pt",
        lambda _: torch_bytes(tensors(), **LEGACY)[:2000],
        "torch.save",
    ),
    "legacy truncated by 100": (
        ".pt",
        lambda _: torch_bytes(tensors(), **LEGACY)[:-100],
        "torch.save",
    ),
    "safetensors truncated to 4": (".safetensors", lambda _: SAVE(GOOD)[:4], DAMAGED),
    "safetensors truncated to 100": (
        ".safetensors",
        lambda _: SAVE(GOOD)[:100],
        DAMAGED,
    ),
    "safetensors truncated by 100": (
        ".safetensors",
        lambda _: SAVE(GOOD)[:-100],
        DAMAGED,
    ),
    "safetensors longer by 1": (
        ".safetensors",
        lambda _: SAVE(GOOD) + b"\0",
        DAMAGED,
    ),
    "header of 2**60 bytes": (
        ".safetensors",
        lambda _: (2**60).to_bytes(8, "little") + SAVE(GOOD)[8:],
        DAMAGED,
    ),
    "header of 2**60 bytes, no suffix": (
        "",
        lambda _: (2**60).to_bytes(8, "little") + SAVE(GOOD)[8:],
        DAMAGED,
    ),
    "header not JSON": (
        ".safetensors",
        lambda _: (8).to_bytes(8, "little") + b"{notjson",
        DAMAGED,
    ),
    "header a list": (
        ".safetensors",
        lambda _: (2).to_bytes(8, "little") + b"[]",
        DAMAGED,
    ),
    "offsets overlap": (".safetensors", lambda _: header(overlapping), DAMAGED),
    "shape beyond the data": (".safetensors", lambda _: header(larger), DAMAGED),
    "unknown dtype": (
        ".safetensors",
        lambda _: header(lambda entries: entries[KEY].update(dtype="F31")),
        DAMAGED,
    ),
    "complex safetensors": (
        ".safetensors",
        lambda _: header(lambda entries: entries[KEY].update(dtype="C64", shape=[8, 16])),
        # Not every version of safetensors knows this dtype.
        "checkpoint.safetensors: ",
    ),
    "booleans in safetensors": (
        ".safetensors",
        lambda _: SAVE(changed(KEY, lambda a: a > 0)),
        f"{KEY} is bool",
    ),
    "complex": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: tensors()[KEY].to(torch.complex64)}),
        f"{KEY} is complex64",
    ),
    "integers": (
        ".safetensors",
        lambda _: SAVE(changed(KEY, lambda a: a.astype(np.int32))),
        f"{KEY} is int32",
    ),
    "booleans": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: tensors()[KEY] > 0}),
        f"{KEY} is bool",
    ),
    "quantized": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: tensors()[KEY].to(torch.float8_e4m3fn)}),
        f"{KEY} is float8",
    ),
    "NaN": (".safetensors", lambda _: SAVE(poisoned(np.nan)), f"{KEY}: 1 of 256 numbers"),
    "infinite": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: torch.tensor(poisoned(-np.inf)[KEY])}),
        f"{KEY}: 1 of 256 numbers",
    ),
    "NaN of bfloat16": (
        ".safetensors",
        lambda _: SAVE({k: v.astype(jnp.bfloat16) for k, v in poisoned(np.nan).items()}),
        f"{KEY}: 1 of 256 numbers",
    ),
    "key missing": (".safetensors", lambda _: SAVE(without(KEY)), f"missing: {KEY}"),
    "key renamed": (".safetensors", lambda _: SAVE(renamed(KEY, "w")), "unexpected: w"),
    "key added": (
        ".pt",
        lambda _: torch_bytes({**tensors(), "w": torch.ones(3)}),
        "unexpected: w (3,)",
    ),
    "key a number": (".pt", lambda _: torch_bytes({**tensors(), 7: torch.ones(3)}), "key 7"),
    "entry a number": (
        ".pt",
        lambda _: torch_bytes({**tensors(), "best": 7}),
        "entry 'best' is of type int",
    ),
    "shape transposed": (
        ".safetensors",
        lambda _: SAVE(changed(KEY, lambda a: a.T.copy())),
        f"shape: {KEY}",
    ),
    "shape flat": (".safetensors", lambda _: SAVE(changed(KEY, np.ravel)), f"shape: {KEY}"),
    "axes of a kernel permuted": (
        ".safetensors",
        lambda _: SAVE(
            changed("decoder0.0.block.0.block.weight", lambda a: a.transpose(2, 3, 4, 1, 0).copy())
        ),
        "shape: decoder0.0.block.0.block.weight",
    ),
    "stride of zero": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: stretched()}),
        f"{KEY} (1048576, 2097152) needs 8796093022208 bytes, 4 are stored",
    ),
    "size beyond the storage": (
        ".pt",
        lambda _: repacked(
            lambda name, data: (
                data.replace(b"K K\x08\x86", b"M\xff\xffK\x08\x86")
                if name.endswith("data.pkl")
                else data
            )
        ),
        "torch.save",
    ),
    "storage beyond its record": (
        ".pt",
        lambda _: repacked(lambda name, data: data[: len(data) // 2] if "/data/" in name else data),
        "torch.save",
    ),
    "sparse": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: tensors()[KEY].to_sparse()}),
        f"{KEY} is a tensor of layout torch.sparse_coo",
    ),
    "meta": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: torch.ones(8, 32, device="meta")}),
        f"{KEY} is a tensor of layout torch.strided on meta",
    ),
    "a list": (".pt", lambda _: torch_bytes([[0.5] * 1000] * 1000), "object of type list"),
    "a tensor": (".pt", lambda _: torch_bytes(torch.ones(3)), "object of type Tensor"),
    "nothing": (".pt", lambda _: torch_bytes({}), "holds nothing"),
    "nothing in safetensors": (".safetensors", lambda _: SAVE({}), "holds nothing"),
    "two state dicts": (
        ".pt",
        lambda _: torch_bytes({"model": tensors(), "net": tensors()}),
        "model and net",
    ),
    "wrapped too often": (
        ".pt",
        lambda _: torch_bytes({"model": {"model": {"model": tensors()}}}),
        "entry 'model' is of type dict",
    ),
    "keys of a loss": (
        ".pt",
        lambda _: torch_bytes(
            {
                "state_dict": {f"model.{k}": v for k, v in tensors().items()}
                | {"loss_function.weight": torch.ones(2)}
            }
        ),
        "loss_function.weight",
    ),
    "keys of two models": (
        ".pt",
        lambda _: torch_bytes(
            {f"{name}.{k}": v for name in ("student", "teacher") for k, v in tensors().items()}
        ),
        "models behind 'student.' and 'teacher.'",
    ),
    "counters that are arrays": (
        ".pt",
        lambda _: torch_bytes({**tensors(), "epoch": torch.arange(3)}),
        "epoch is int64",
    ),
    "nothing but counters": (".pt", lambda _: torch_bytes({"epoch": 7}), "holds nothing"),
    "a counter that is a bomb": (
        ".pt",
        lambda marker: torch_bytes({**tensors(), "epoch": Bomb(marker)}),
        "mkdir",
    ),
    "bomb in a pickle": (".pt", lambda marker: pickle.dumps(Bomb(marker), 2), "mkdir"),
    "bomb in a newer pickle": (".pt", lambda marker: pickle.dumps(Bomb(marker)), "torch.save"),
    "bomb in a state dict": (
        ".pt",
        lambda marker: torch_bytes({**tensors(), KEY: Bomb(marker)}),
        "mkdir",
    ),
    "bomb beside a state dict": (
        ".ckpt",
        lambda marker: torch_bytes({"state_dict": tensors(), "callbacks": Bomb(marker)}),
        "mkdir",
    ),
    "bomb in a legacy file": (
        ".pt",
        lambda marker: torch_bytes({**tensors(), KEY: Bomb(marker)}, **LEGACY),
        "mkdir",
    ),
    "bomb named safetensors": (
        ".safetensors",
        lambda marker: torch_bytes({**tensors(), KEY: Bomb(marker)}),
        "mkdir",
    ),
    "numpy scalar": (
        ".ckpt",
        lambda _: torch_bytes({"state_dict": tensors(), "best": np.float64(0.5)}),
        "only if you trust",
    ),
    "whole module": (".pt", lambda _: torch_bytes(Module()), "only if you trust"),
    "TorchScript": (".pt", lambda _: script(), "a TorchScript program"),
    "zip of another thing": (
        ".pt",
        lambda _: archive({"word/a.xml": b"<xml>"}),
        "no data.pkl",
    ),
    "empty zip": (".pt", lambda _: archive({}), "no data.pkl"),
    "zip with an empty pickle": (".pt", lambda _: archive({"archive/data.pkl": b""}), "torch.save"),
    "zip that is compressed": (
        ".pt",
        lambda _: repacked(lambda name, data: data, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "bit flipped in the names": (".pt", lambda _: flipped(KEY.encode()), "damaged zip"),
    "bit flipped in the numbers": (".pt", lambda _: flipped(GOOD[KEY].tobytes()), "damaged zip"),
    "tensor without its methods": (
        ".pt",
        lambda _: torch_bytes({**tensors(), KEY: Odd(tensors()[KEY])}),
        "not a state dict of tensors",
    ),
    "folder": (".pt", None, "a folder"),
    "missing": (".pt", None, "no such file"),
}


def message(name: str, folder: Path) -> str:
    """Returns the message about a file of the table; fails if it was read or executed."""
    suffix, make, _ = TABLE[name]
    path = folder / f"checkpoint{suffix}"
    marker = folder / "marker"
    if name == "folder":
        path.mkdir()
    elif make:
        path.write_bytes(make(marker))
    with pytest.raises((CheckpointError, WeightsError)) as error:
        from_torch(read_state_dict(path).state_dict, CFG)
    assert not marker.exists()
    return str(error.value)


@pytest.mark.parametrize("name", TABLE)
def test_refused_by_a_clear_line(name, tmp_path):
    text = message(name, tmp_path)
    first = text.splitlines()[0]
    assert TABLE[name][2] in text
    # A file is named in the first line; keys that do not fit the model are listed below it.
    assert str(tmp_path) in first or first.startswith("state dict: ")
    assert str(tmp_path) not in first or len(text.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_the_good_one_is_read_whatever_its_name(tmp_path, suffix, kind):
    path = tmp_path / f"checkpoint{suffix}"
    options = LEGACY if kind == "legacy" else {}
    path.write_bytes(SAVE(GOOD) if kind == "safetensors" else torch_bytes(tensors(), **options))
    found = read_state_dict(path)
    assert found.state_dict.keys() == GOOD.keys()
    assert all(np.array_equal(found.state_dict[key], GOOD[key]) for key in GOOD)
    assert found.description == "state dict"


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def print_table() -> None:
    for name in TABLE:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}\n    {message(name, Path(folder))}")


if __name__ == "__main__":
    sys.exit(print_table())
