"""Packages of the extras `volumes` and `dicom`, imported when they are first needed."""

import importlib
from types import ModuleType

from unetr_flax.imaging.volume import VolumeError


def import_nibabel() -> ModuleType:
    """Imports nibabel, which knows the headers of NIfTI files.

    Raises:
      VolumeError: if it is not installed.
    """
    return _import("nibabel", "NIfTI files need nibabel", "volumes")


def import_ndimage() -> ModuleType:
    """Imports scipy.ndimage, which resamples arrays.

    Raises:
      VolumeError: if scipy is not installed.
    """
    return _import("scipy.ndimage", "resampling needs scipy", "volumes")


def import_simpleitk() -> ModuleType:
    """Imports SimpleITK, which reads DICOM files, and silences its warnings.

    Raises:
      VolumeError: if it is not installed.
    """
    simpleitk = _import("SimpleITK", "DICOM files need SimpleITK", "dicom")
    # They are written to stderr, past Python's warnings; errors are raised all the same.
    simpleitk.ProcessObject.SetGlobalWarningDisplay(False)
    return simpleitk


def _import(name: str, need: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise VolumeError(f"{need}: pip install 'unetr-flax[{extra}]'") from None
