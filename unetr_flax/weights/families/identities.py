"""Arrays under which a layer changes nothing, for keys that a file needs but no model applies."""

import numpy as np


def identity_norm(name: str, width: int) -> dict[str, np.ndarray]:
    """Returns scale and shift of a norm, float32 [width] each."""
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }


def identity_linear(name: str, width: int, *, bias: bool) -> dict[str, np.ndarray]:
    """Returns the weight [width, width] and, if there is one, the bias [width] of a linear map."""
    arrays: dict[str, np.ndarray] = {f"{name}.weight": np.eye(width, dtype=np.float32)}
    if bias:
        arrays[f"{name}.bias"] = np.zeros(width, np.float32)
    return arrays
