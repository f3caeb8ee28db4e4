"""The version of cuDNN that JAX uses on NVIDIA's GPUs, and a check that it computes correctly."""

import importlib
import importlib.metadata

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# From the first of these versions up to, not including, the second, 3D convolutions of 16-bit types
# are silently wrong for some shapes (pytorch/pytorch#163539, #166480).
WRONG_CONVOLUTIONS = ((9, 8, 0), (9, 15, 0))

# JAX's plugins and the packages that contain their cuDNN, in the order in which JAX tries them.
_PLUGINS = {
    "jax_cuda13_plugin": "nvidia-cudnn-cu13",
    "jax_cuda12_plugin": "nvidia-cudnn-cu12",
}


class CudnnError(ValueError):
    """A cuDNN that computes wrong results; the message says which version, and what to do."""


def cuda_devices() -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Lists the CUDA devices that this process may use; none without JAX's CUDA plugin."""
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def cudnn_version() -> tuple[int, int, int] | None:
    """Returns (major, minor, patch) of the cuDNN that JAX uses or would use; None if there is none.

    JAX has no public function for it (jax-ml/jax#32729), so its plugin is asked, and if that does
    not answer, the version of the installed package is read.
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
    """Raises if this machine's cuDNN computes wrong 3D convolutions in a dtype.

    Programs call it before anything else.

    Args:
      dtype: dtype of the computation.

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
