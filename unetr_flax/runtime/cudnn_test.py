import importlib.metadata
import sys
import types

import jax.numpy as jnp
import pytest

from unetr_flax.runtime import cudnn
from unetr_flax.runtime.cudnn import (
    CudnnError,
    cuda_devices,
    cudnn_version,
    refuse_wrong_convolutions,
)


def pretend(monkeypatch, *, loaded=None, installed=()):
    """Fakes plugins and packages: `loaded` is the number that the plugin for CUDA 12 returns."""
    installed = dict(installed)

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(cudnn, "cuda_devices", lambda: ["gpu"])
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        monkeypatch.setitem(sys.modules, f"{plugin}._versions", None)
    if loaded is not None:
        versions = types.ModuleType("jax_cuda12_plugin._versions")
        versions.cudnn_get_version = lambda: loaded
        monkeypatch.setitem(sys.modules, "jax_cuda12_plugin", types.ModuleType("jax_cuda12_plugin"))
        monkeypatch.setitem(sys.modules, "jax_cuda12_plugin._versions", versions)


def test_the_version_is_that_of_the_plugin_or_of_its_package(monkeypatch):
    pretend(monkeypatch)
    assert cudnn_version() is None
    pretend(monkeypatch, loaded=91002)
    assert cudnn_version() == (9, 10, 2)
    # PyTorch may install a cuDNN for another CUDA than JAX's.
    both = {"nvidia-cudnn-cu12": "9.8.0.87", "nvidia-cudnn-cu13": "9.15.1.9"}
    pretend(monkeypatch, installed={"jax_cuda13_plugin": "0.10.1", **both})
    assert cudnn_version() == (9, 15, 1)
    pretend(monkeypatch, installed={"jax_cuda12_plugin": "0.10.1", **both})
    assert cudnn_version() == (9, 8, 0)
    pretend(monkeypatch, installed=both)
    assert cudnn_version() is None


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_wrong_convolutions_are_refused(monkeypatch, dtype):
    for number, text in ((90800, "9.8.0"), (91002, "9.10.2"), (91400, "9.14.0")):
        pretend(monkeypatch, loaded=number, installed={"jax_cuda12_plugin": "0.10.1"})
        with pytest.raises(CudnnError, match=f"^cuDNN {text}: .* in {jnp.dtype(dtype)}") as found:
            refuse_wrong_convolutions(dtype)
        assert 'pip install -U "nvidia-cudnn-cu12>=9.15"' in str(found.value)
    for number in (90701, 91500, 92100):
        pretend(monkeypatch, loaded=number)
        refuse_wrong_convolutions(dtype)


def test_correct_combinations_are_not_refused(monkeypatch):
    pretend(monkeypatch, loaded=91002)
    refuse_wrong_convolutions("float32")
    pretend(monkeypatch)
    refuse_wrong_convolutions("bfloat16")
    pretend(monkeypatch, loaded=91002)
    monkeypatch.setattr(cudnn, "cuda_devices", lambda: [])
    refuse_wrong_convolutions("bfloat16")


def test_cuda_devices_are_gpus():
    assert all(device.platform == "gpu" for device in cuda_devices())
