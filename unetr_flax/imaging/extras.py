"""Packages of the extra `volumes`, imported when they are first needed."""

import importlib
from types import ModuleType

from unetr_flax.imaging.volume import VolumeError


def import_nibabel() -> ModuleType:
    """Imports nibabel, which reads and writes NIfTI files.

    Raises:
      VolumeError: if it is not installed.
    """
    return _import("nibabel", "NIfTI files need nibabel")


def import_ndimage() -> ModuleType:
    """Imports scipy.ndimage, which resamples arrays.

    Raises:
      VolumeError: if scipy is not installed.
    """
    return _import("scipy.ndimage", "resampling needs scipy")


def _import(name: str, need: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise VolumeError(f"{need}: pip install 'unetr-flax[volumes]'") from None
