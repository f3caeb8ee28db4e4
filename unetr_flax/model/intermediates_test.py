"""Tests that the results that Flax shows for the modules of a model are arrays."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from unetr_flax import UNETR
from unetr_flax.model.abstract import abstract_image, abstract_variables
from unetr_flax.model.lowering_test import CONFIGS
from unetr_flax.ops.features import DeferredNorm, DeferredUpsample

BATCH = 2


def is_result(x):
    """Tells whether a node of a tree is a deferred result, if there are any."""
    return isinstance(x, DeferredNorm | DeferredUpsample)


def intermediates(model, train):
    """Traces a model, and returns the shapes of modules' results by the modules' paths.

    Modules that share a scope share a path.
    """
    found = {}

    def apply(variables, x):
        _, state = model.apply(variables, x, train=train, capture_intermediates=True, mutable=True)
        for path, results in flatten_dict(state["intermediates"]).items():
            results = jax.tree.leaves(results, is_leaf=is_result)
            assert all(isinstance(result, jax.Array) for result in results), path
            found[path[:-1]] = {result.shape for result in results}

    jax.eval_shape(apply, abstract_variables(model), abstract_image(model.config, BATCH))
    return found


def module_paths(variables):
    """Returns the paths of all modules with parameters inside, the model's own () included."""
    paths = flatten_dict(variables["params"])
    return {path[:end] for path in paths for end in range(len(path))}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_captured_intermediates_are_arrays_of_every_module(family, remat, train):
    cfg = CONFIGS[family]
    model = UNETR(cfg, remat=remat)
    found = intermediates(model, train)
    params = abstract_variables(model)["params"]
    assert found.keys() >= module_paths({"params": params})
    assert found[()] == {(BATCH, *cfg.img_size, cfg.out_channels)}
    size = cfg.grid_size
    for i, spec in enumerate(cfg.decoder_stages):
        size = tuple(n * s for n, s in zip(size, spec.strides, strict=True))
        stage = ("decoder", f"stage_{i}")
        assert found[stage] == {(BATCH, *size, spec.fuse_channels[-1])}
        assert found[*stage, "upsample"] == {(BATCH, *size, spec.channels)}
    for path, leaf in flatten_dict(params).items():
        if path[0] != "decoder" or path[-1] not in ("kernel", "scale"):
            continue
        # Results of convolutions and norms are volumes as wide as their parameters.
        ((batch, *spatial, channels),) = found[path[:-1]]
        assert batch == BATCH
        assert channels == leaf.shape[-1]
        assert len(spatial) == len(cfg.img_size)
        assert math.prod(spatial) >= cfg.num_patches
    for i in range(cfg.num_layers):
        block = ("encoder", f"block_{i}")
        for inside in ((), ("norm1",), ("attention",), ("norm2",), ("feed_forward",)):
            assert found[block + inside] == {(BATCH, cfg.num_patches, cfg.hidden_size)}


@pytest.mark.parametrize("family", CONFIGS)
def test_captured_numbers_are_those_of_the_computation(family):
    """Norms that a convolution absorbs are shown like norms that are computed separately."""
    cfg = CONFIGS[family]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, *cfg.img_size, cfg.in_channels)), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + 0.3, leaf.dtype),
        abstract_variables(UNETR(cfg)),
    )

    def run(lowering):
        model = UNETR(cfg, lowering=lowering)
        apply = jax.jit(
            lambda variables, x: model.apply(
                variables, x, train=True, capture_intermediates=True, mutable=True
            )
        )
        return apply(variables, x)[1]["intermediates"]

    tuned, plain = run("auto"), run("xla")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tuned, is_leaf=is_result))
    for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max()


@pytest.mark.parametrize(("remat", "train"), [(False, False), (True, True)])
@pytest.mark.parametrize("family", CONFIGS)
def test_tabulate_shows_arrays_of_every_module(family, remat, train):
    cfg = CONFIGS[family]
    model = UNETR(cfg, remat=remat)
    x = jnp.zeros((BATCH, *cfg.img_size, cfg.in_channels))
    console = {"width": 300, "color_system": None}
    table = nn.tabulate(model, jax.random.key(0), console_kwargs=console)(x, train=train)
    assert "Deferred" not in table
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    outputs = {row[0]: row[3] for row in rows if len(row) > 3 and row[0]}
    for path in module_paths(abstract_variables(model)):
        name = "/".join(path)
        if path:
            assert "float32[" in outputs[name], name
    assert outputs["decoder"] == f"float32[{BATCH},{','.join(map(str, cfg.img_size))},3]"
