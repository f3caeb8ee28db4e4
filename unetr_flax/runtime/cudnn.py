"""NVIDIA's GPUs and the cuDNN that JAX computes with on them."""

import importlib
import importlib.metadata

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# In these versions, from the first to before the second, 3D convolutions of narrow types are
# silently wrong for some shapes (pytorch/pytorch#163539, #166480).
WRONG_CONVOLUTIONS = ((9, 8, 0), (9, 15, 0))

# JAX's plugins and the packages that bring their cuDNN, in the order in which JAX looks for them.
_PLUGINS = {
    "jax_cuda13_plugin": "nvidia-cudnn-cu13",
    "jax_cuda12_plugin": "nvidia-cudnn-cu12",
}


class CudnnError(ValueError):
    """A cuDNN that computes wrongly; the message says which, and what to do."""


def cuda_devices() -> list[jax.Device]:
    """The CUDA devices that this process may use; none without JAX's plugin for them."""
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def cudnn_version() -> tuple[int, int, int] | None:
    """(major, minor, patch) of the cuDNN that JAX has loaded or would load; None if there is none.

    JAX has no public way to ask (jax-ml/jax#32729): its plugin is asked, then the package.
    """
    for plugin, package in _PLUGINS.items():
        try:
            number = importlib.import_module(f"{plugin}._versions").cudnn_get_version()
        except (ImportError, AttributeError, RuntimeError):
            pass
        else:
            return number // 10000, number // 100 % 100, number % 100
        try:
            importlib.metadata.version(plugin)
            numbers = importlib.metadata.version(package).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        major, minor, patch = (int(text) for text in numbers[:3])
        return major, minor, patch
    return None


def refuse_wrong_convolutions(dtype: DTypeLike) -> None:
    """Makes sure that 3D convolutions of a dtype are right on this machine; a programs' first step.

    Raises:
      CudnnError: if there are CUDA devices, the dtype is bfloat16 or float16, and this cuDNN is
        known to compute wrong results.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or not cuda_devices():
        return
    version = cudnn_version()
    first, fixed = WRONG_CONVOLUTIONS
    if version is None or not first <= version < fixed:
        return
    plugins = [plugin for plugin in _PLUGINS if _is_installed(plugin)]
    packages = [_PLUGINS[plugin] for plugin in plugins] or list(_PLUGINS.values())[-1:]
    needed = ".".join(map(str, fixed[:2]))
    raise CudnnError(
        f"cuDNN {'.'.join(map(str, version))}: computes wrong 3D convolutions in {dtype.name} "
        f'without an error; pip install -U "{packages[0]}>={needed}", or take float32'
    )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
