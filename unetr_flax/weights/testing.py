"""A small model and its folder, for the tests of model folders."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from unetr_flax import UNETR, Preprocessing, UNETRConfig
from unetr_flax.imaging.intensity import ZScore
from unetr_flax.weights import save_pretrained

SIZES: dict[str, Any] = {"hidden_size": 8, "num_heads": 2, "num_layers": 4}
CFG = UNETRConfig.reference((16, 32, 16), 1, 2, 16, **SIZES)
OTHER = UNETRConfig.reference((32, 16, 16), 2, 3, 16, **SIZES)
LEAF = "params/encoder/block_0/norm1/scale"
PREPROCESSING = Preprocessing(("T1",), (ZScore(),), ("background", "tumor"), spacing=(1, 1, 2))
PROVENANCE = {"source": "UNETR_model.pt", "description": "state dict"}


def variables_of(cfg, seed=0):
    x = jax.ShapeDtypeStruct((1, *cfg.img_size, cfg.in_channels), jnp.float32)
    shapes = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), x)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


VARIABLES = variables_of(CFG)


def flat(variables: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(variables, sep="/")


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert isinstance(a[name], np.ndarray)
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == np.asarray(b[name]).tobytes()


def save_model(path):
    save_pretrained(path, CFG, VARIABLES, preprocessing=PREPROCESSING, provenance=PROVENANCE)
    return path


def rewrite(folder, *, leaves=None, header=None):
    """Writes model.safetensors and config.json with other leaves or another header."""
    old = read_raw(folder)
    text = json.dumps({**old, **(header or {})})
    leaves = flat(VARIABLES) if leaves is None else leaves
    safetensors.numpy.save_file(leaves, folder / "model.safetensors", {"unetr_flax": text})
    (folder / "config.json").write_text(text)


def read_raw(folder):
    return json.loads((folder / "config.json").read_text())
