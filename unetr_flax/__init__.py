"""UNETR for volumetric segmentation in JAX/Flax, proven equal to PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetr_flax.imaging.preprocessing import Preprocessing
    from unetr_flax.inference.segment import Segmenter
    from unetr_flax.inference.sliding_window import sliding_window_inference
    from unetr_flax.model.config import UNETRConfig
    from unetr_flax.model.unetr import UNETR

__all__ = ["UNETR", "Preprocessing", "Segmenter", "UNETRConfig", "sliding_window_inference"]

_MODULES = {
    "UNETR": "unetr_flax.model.unetr",
    "UNETRConfig": "unetr_flax.model.config",
    "Preprocessing": "unetr_flax.imaging.preprocessing",
    "Segmenter": "unetr_flax.inference.segment",
    "sliding_window_inference": "unetr_flax.inference.sliding_window",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: JAX takes a second, which the command line's help need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
