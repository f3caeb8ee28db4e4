"""A model's forward pass as ONNX, by PyTorch's exporter, checked by ONNX Runtime."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unetr_flax.export.errors import ExportError
from unetr_flax.export.folder import ONNX, ONNX_WEIGHTS
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.runtime.garbage import collector_paused
from unetr_flax.weights import to_torch

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")

# The version of the operators that PyTorch's exporter itself is written for. Later ones would gain
# nothing but a GELU operator, which fewer programs know.
OPSET = 18

# Largest error of the logits, relative to the largest logit.
TOLERANCE = 1e-4

# A file of ONNX is at most 2^31 bytes; the rest is for the graph.
MAX_BYTES_WITHIN = 2_000_000_000


def write_onnx(folder: Path, cfg: UNETRConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Writes model.onnx, and model.onnx.data beside it if the weights do not fit into one file.

    The graph is that of the family's PyTorch model with the same weights, in float32. It takes
    "image", [batch, in_channels, *img_size], for any batch, and returns "logits",
    [batch, out_channels, *img_size]: channels come first. ONNX Runtime computes the logits of a
    random image on CPU, which must equal those of the Flax model.

    Args:
      folder: an existing folder.
      cfg: the model's configuration.
      variables: the model's variables.

    Returns:
      What export.json says of it.

    Raises:
      ExportError: if a package is not installed, or ONNX Runtime computes other logits.
      TorchModelError: if the package of the family's PyTorch model is not installed.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"ONNX needs {package}: pip install 'unetr-flax[onnx]'")
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    external = size > MAX_BYTES_WITHIN
    _write(folder / ONNX, cfg, variables, external_data=external)
    error = _relative_error(folder / ONNX, cfg, variables)
    if not error <= TOLERANCE:
        raise ExportError(
            f"ONNX Runtime's logits differ by {error:.1e} of the largest logit, at most "
            f"{TOLERANCE:.0e} is rounding"
        )
    return {
        "program": ONNX,
        "weights": ONNX_WEIGHTS if external else None,
        "inputs": [_array("image", cfg, cfg.in_channels, "in_channels")],
        "outputs": [_array("logits", cfg, cfg.out_channels, "out_channels")],
        "opset": OPSET,
        "onnxruntime_relative_error": error,
        "written_by": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _write(
    path: Path, cfg: UNETRConfig, variables: Mapping[str, Any], *, external_data: bool
) -> None:
    import torch

    from unetr_flax.parity.torch_models import load_weights, torch_model_of

    model = load_weights(torch_model_of(cfg), to_torch(variables, cfg), cfg)
    model.eval().requires_grad_(False)
    # PyTorch takes a dimension of size 1 in the example for a constant.
    image = torch.zeros(2, cfg.in_channels, *cfg.img_size)
    with _quiet(), collector_paused():
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        # The exporter notes stack traces, with the paths of this machine's source files.
        for node in program.model.graph:
            node.metadata_props.clear()
        program.save(path, external_data=external_data)


def _relative_error(path: Path, cfg: UNETRConfig, variables: Mapping[str, Any]) -> float:
    """Returns max|a - b| / max|b| of the logits a of ONNX Runtime and b of the Flax model."""
    import onnxruntime

    image = np.random.default_rng(0).standard_normal((1, *cfg.img_size, cfg.in_channels))
    image = image.astype(np.float32)
    # The plain definitions compile sooner, and platforms differ least in them.
    model = UNETR(cfg, lowering="xla")
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(model.apply)(variables, image))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(["logits"], {"image": np.moveaxis(image, -1, 1)})
    logits = np.moveaxis(np.asarray(output), 1, -1)
    if logits.shape != expected.shape:
        raise ExportError(f"ONNX Runtime's logits are {logits.shape}, must be {expected.shape}")
    # A model of zeros has no largest logit to compare with.
    return float(np.abs(logits - expected).max() / (np.abs(expected).max() or 1.0))


def _array(name: str, cfg: UNETRConfig, channels: int, channels_name: str) -> dict[str, Any]:
    return {
        "name": name,
        "shape": ["batch", channels, *cfg.img_size],
        "dtype": "float32",
        "layout": f"[batch, {channels_name}, *img_size]",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what PyTorch's exporter says about packages and deprecations of its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
