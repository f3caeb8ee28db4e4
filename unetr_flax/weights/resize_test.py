import dataclasses

import flax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from unetr_flax import UNETRConfig
from unetr_flax.weights import WeightsError, resize_position_embedding
from unetr_flax.weights.resize import PATH

torch = pytest.importorskip("torch")

E = 6


def config(grid, patch_size=16):
    img_size = tuple(patch_size * size for size in grid)
    sizes = {"patch_size": patch_size, "hidden_size": E, "num_layers": 4, "num_heads": 2}
    return UNETRConfig.reference(img_size, 1, 2, **sizes)


def variables_of(position):
    other = np.ones((3, 2), np.float32)
    leaves = {PATH: position, ("batch_stats", "decoder", "mean"): other}
    return traverse_util.unflatten_dict(leaves)


def position_of(variables):
    return traverse_util.flatten_dict(variables)[PATH]


@pytest.mark.parametrize(
    ("old", "new", "mode"),
    [
        ((2, 3, 4), (5, 7, 6), "trilinear"),
        ((6, 5, 7), (3, 2, 4), "trilinear"),
        ((2, 6, 3), (5, 6, 1), "trilinear"),
        ((1, 4, 2), (3, 2, 9), "trilinear"),
        ((3, 4), (7, 2), "bilinear"),
        ((5,), (8,), "linear"),
    ],
)
def test_interpolates_as_torch(old, new, mode):
    cfg = config(old)
    position = np.random.default_rng(0).standard_normal((1, cfg.num_patches, E))
    size = tuple(16 * points for points in new)
    resized, variables = resize_position_embedding(cfg, variables_of(position), size)

    grid = torch.from_numpy(position.reshape(1, *old, E)).movedim(-1, 1)
    theirs = torch.nn.functional.interpolate(grid, size=new, mode=mode, align_corners=False)
    theirs = theirs.movedim(1, -1).reshape(1, -1, E).numpy()
    ours = position_of(variables)
    assert ours.shape == (1, resized.num_patches, E)
    assert np.abs(ours - theirs).max() < 1e-12
    assert resized == dataclasses.replace(cfg, img_size=size)


def test_what_is_linear_stays_linear_on_any_number_of_axes():
    cfg = config((4, 3, 2, 3), patch_size=2)
    axis = np.arange(4) + 0.5
    grid = np.broadcast_to(axis[:, None, None, None, None], (*cfg.grid_size, E))
    variables = variables_of(grid.reshape(1, -1, E))
    _, resized = resize_position_embedding(cfg, variables, (16, 2, 4, 6))
    found = position_of(resized).reshape(8, 1, 2, 3, E)
    expected = np.clip((np.arange(8) + 0.5) / 2, 0.5, 3.5)[:, None, None, None, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_dtype_is_kept_and_all_else_the_same_object(dtype):
    cfg = config((2, 3, 2))
    variables = variables_of(np.random.default_rng(0).standard_normal((1, 12, E)).astype(dtype))
    before = position_of(variables).copy()
    _, resized = resize_position_embedding(cfg, flax.core.freeze(variables), [48, 32, 64])
    assert position_of(resized).dtype == np.dtype(dtype)
    assert position_of(resized).shape == (1, 3 * 2 * 4, E)
    assert resized["batch_stats"]["decoder"]["mean"] is variables["batch_stats"]["decoder"]["mean"]
    np.testing.assert_array_equal(position_of(variables), before)


def test_the_same_grid_is_bit_exact():
    cfg = config((2, 3, 2))
    position = np.full((1, 12, E), -0.0, np.float32)
    same, variables = resize_position_embedding(cfg, variables_of(position), cfg.img_size)
    assert same == cfg
    assert position_of(variables) is position


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (np.ones((1, 12, E + 1)), r"position_embedding is \(1, 12, 7\), must be \(1, 12, 6\)"),
        (np.ones((12, E)), r"position_embedding is \(12, 6\)"),
    ],
)
def test_refuses_what_does_not_fit(position, message):
    with pytest.raises(WeightsError, match=message):
        resize_position_embedding(config((2, 3, 2)), variables_of(position), (32, 32, 32))


def test_names_a_missing_leaf_and_a_bad_size():
    cfg = config((2, 3, 2))
    with pytest.raises(WeightsError, match="encoder/embedding/position_embedding is missing"):
        resize_position_embedding(cfg, {"params": {}}, (32, 32, 32))
    with pytest.raises(ValueError, match="img_size"):
        resize_position_embedding(cfg, variables_of(np.ones((1, 12, E))), (32, 33, 32))
