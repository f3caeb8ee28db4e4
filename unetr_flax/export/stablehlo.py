"""A model's forward pass as StableHLO, by `jax.export`."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax import export

from unetr_flax import ops
from unetr_flax.export.compatibility import sure_to_load
from unetr_flax.export.errors import ExportError
from unetr_flax.export.folder import STABLEHLO, WEIGHTS
from unetr_flax.model.config import UNETRConfig
from unetr_flax.model.unetr import UNETR
from unetr_flax.runtime.garbage import collector_paused

Platform = Literal["cpu", "cuda", "tpu"]
Dtype = Literal["float32", "bfloat16"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda", "tpu")

# A serialized program is at most 2^31 bytes; the rest is for the program without its weights.
MAX_BYTES_WITHIN = 2_000_000_000


def write_stablehlo(
    folder: Path,
    cfg: UNETRConfig,
    variables: Mapping[str, Any],
    *,
    platforms: Sequence[Platform] = PLATFORMS,
    dtype: Dtype = "float32",
    lowering: ops.Lowering = "auto",
    with_weights: bool = False,
) -> dict[str, Any]:
    """Writes model.stablehlo and, unless the program has the weights in it, model.safetensors.

    The program takes (weights, image), or (image) if the weights are in it. Image:
    [b, *img_size, in_channels], float32, for any b; weights: {name: array}, as read from
    model.safetensors. It returns the logits [b, *img_size, out_channels].

    Args:
      folder: an existing folder.
      cfg: the model's configuration.
      variables: the model's variables; written as float32.
      platforms: the platforms that the program runs on.
      dtype: dtype of the computation and the logits.
      lowering: "auto" or "xla", as for `UNETR`.
      with_weights: whether the weights are in the program, not apart.

    Returns:
      What export.json says of it.

    Raises:
      ExportError: if flatbuffers is not installed, platforms are missing or repeat, or the weights
        are too large to be in a program.
    """
    if not platforms or len(set(platforms)) < len(platforms):
        raise ExportError(f"platforms {list(platforms)}: must be one or more, each only once")
    weights = {
        name: np.asarray(leaf, np.float32, order="C")
        for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
    }
    size = sum(leaf.nbytes for leaf in weights.values())
    if with_weights and size > MAX_BYTES_WITHIN:
        raise ExportError(
            f"{size / 1e9:.2f} GB of weights: a program holds at most {MAX_BYTES_WITHIN / 1e9:.2f} "
            "GB, write them apart (without --with-weights)"
        )
    if importlib.util.find_spec("flatbuffers") is None:
        raise ExportError("StableHLO needs flatbuffers: pip install 'unetr-flax[export]'")
    exported = _export(cfg, weights, platforms, dtype, lowering, with_weights)
    (folder / STABLEHLO).write_bytes(exported.serialize())
    if not with_weights:
        (folder / WEIGHTS).write_bytes(safetensors.numpy.save(weights))
    inputs = [] if with_weights else [{"name": "weights", "dtype": "float32", "file": WEIGHTS}]
    image, logits = exported.in_avals[-1], exported.out_avals[0]
    jaxlib = importlib.metadata.version("jaxlib")
    return {
        "program": STABLEHLO,
        "weights": None if with_weights else WEIGHTS,
        "inputs": [*inputs, _array("image", image, "in_channels")],
        "outputs": [_array("logits", logits, "out_channels")],
        "platforms": list(exported.platforms),
        "lowering": lowering,
        "matmul_precision": _matmul_precision(),
        "written_by": {"jax": jax.__version__, "jaxlib": jaxlib},
        "calling_convention_version": exported.calling_convention_version,
        "sure_to_load": sure_to_load(jaxlib, datetime.date.today()),
    }


def _export(
    cfg: UNETRConfig,
    weights: dict[str, np.ndarray],
    platforms: Sequence[Platform],
    dtype: Dtype,
    lowering: ops.Lowering,
    with_weights: bool,
) -> export.Exported:
    model = UNETR(cfg, dtype=jnp.dtype(dtype), lowering=lowering)

    def forward(weights, image):
        return model.apply(traverse_util.unflatten_dict(weights, sep="/"), image)

    (batch,) = export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, *cfg.img_size, cfg.in_channels), jnp.float32)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    with ops.exportable(), _without_source_locations(), collector_paused():
        if with_weights:
            function = jax.jit(lambda image: forward(weights, image))
            return export.export(function, platforms=platforms)(image)
        return export.export(jax.jit(forward), platforms=platforms)(shapes, image)


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of programs."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _array(name: str, aval: Any, channels: str) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    layout = f"[b, *img_size, {channels}]"
    return {"name": name, "shape": shape, "dtype": aval.dtype.name, "layout": layout}


def _matmul_precision() -> str | None:
    """Returns the precision of float32 products in the program; None is the platform's default."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
