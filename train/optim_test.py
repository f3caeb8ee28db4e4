import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optim import (
    clip_by_global_norm,
    decay_mask,
    layer_scales,
    learning_rate_schedule,
    make_optimizer,
    matrices,
)
from unetr_flax import UNETR, UNETRConfig


def test_schedule_rises_linearly_then_falls_to_zero():
    schedule = learning_rate_schedule(2.0, total_steps=100, warmup_fraction=0.1)
    rates = [float(schedule(jnp.int32(i))) for i in range(101)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert rates[9] == 2
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert 0 < rates[99] < 1e-3
    assert rates[100] == 0


@pytest.mark.parametrize("decay", ["poly", "constant"])
def test_other_schedules_start_where_the_warm_up_ends(decay):
    schedule = learning_rate_schedule(2.0, 100, 0.1, decay)
    rates = np.array([float(schedule(jnp.int32(i))) for i in range(101)])
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    # nnU-Net's rule, with the steps after the warm-up as the whole.
    left = np.clip(1 - np.arange(91) / 91, 0, 1)
    expected = 2 * left**0.9 if decay == "poly" else np.full(91, 2.0)
    np.testing.assert_allclose(rates[9:100], expected, rtol=1e-5)


@pytest.fixture(scope="module")
def params():
    """Shapes of the parameters of a UNETR with four blocks."""
    cfg = UNETRConfig.reference(
        (16, 32, 16), 1, 2, light_r=32, hidden_size=16, num_layers=4, num_heads=2
    )
    shapes = jax.eval_shape(UNETR(cfg).init, jax.random.key(0), jnp.zeros((1, 16, 32, 16, 1)))
    return shapes["params"]


def by_name(tree, is_leaf=None):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_earlier_layers_of_the_encoder_learn_more_slowly(params):
    scales = by_name(layer_scales(params, 0.5))
    assert scales["encoder/embedding/position_embedding"] == 0.5**5
    assert scales["encoder/block_0/attention/qkv/kernel"] == 0.5**4
    assert scales["encoder/block_3/norm1/scale"] == 0.5
    assert {x for name, x in scales.items() if name.startswith("decoder")} == {1.0}


def test_the_layer_decay_scales_the_whole_update(params):
    ones = jax.tree.map(lambda x: jnp.ones((2,)), params)
    updates = []
    for layer_decay in (1.0, 0.5):
        options = {"weight_decay": 0.5, "clip_norm": 1.0, "layer_decay": layer_decay}
        tx = make_optimizer(lambda count: 0.1, **options)
        updates.append(by_name(tx.update(ones, tx.init(ones), ones)[0]))
    scales = by_name(layer_scales(params, 0.5))
    for name, plain in updates[0].items():
        np.testing.assert_allclose(updates[1][name], scales[name] * plain, rtol=1e-6)


def test_only_kernels_decay(params):
    decays = by_name(decay_mask(params))
    assert decays["encoder/embedding/projection/kernel"]
    assert decays["encoder/block_3/attention/qkv/kernel"]
    assert not decays["encoder/embedding/position_embedding"]
    assert not decays["encoder/block_0/attention/qkv/bias"]
    assert not decays["encoder/block_0/norm1/scale"]
    assert {path.rsplit("/")[-1] for path, decay in decays.items() if decay} == {"kernel"}


def test_decay_and_clipping_reach_the_update():
    params = {"kernel": jnp.full((2, 3), 10.0), "bias": jnp.full((3,), 10.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = make_optimizer(lambda count: 0.1, weight_decay=0.5, clip_norm=1.0)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 10, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)

    # Adam forgets the scale of gradients, so clipping shows in its moments.
    _, state = tx.update(jax.tree.map(lambda x: x + 7, zeros), tx.init(params), params)
    moments = optax.tree.get(state, "mu")
    assert optax.tree.norm(moments) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_optax_s(max_norm):
    grads = {"a": jnp.arange(12.0).reshape(3, 4), "b": -jnp.ones(5)}
    ours, theirs = (
        clip(max_norm).update(grads, optax.EmptyState())[0]
        for clip in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_second_moment_forgets_as_fast_as_it_is_told():
    params = {"kernel": jnp.ones(3)}
    gradients = [jnp.full(3, x) for x in (3.0, 0.1, 0.2)]

    def after(tx):
        found, state = params, tx.init(params)
        for gradient in gradients:
            updates, state = tx.update({"kernel": gradient}, state, found)
            found = optax.apply_updates(found, updates)
        return found["kernel"]

    ours = make_optimizer(lambda count: 0.1, weight_decay=0.5, clip_norm=1e6, b2=0.9)
    theirs = optax.adamw(0.1, b2=0.9, weight_decay=0.5)
    np.testing.assert_allclose(after(ours), after(theirs), rtol=1e-6)
    assert not np.allclose(after(theirs), after(optax.adamw(0.1, weight_decay=0.5)), rtol=1e-3)


def test_matrices_map_inputs_to_outputs(params):
    axes = by_name(matrices(params), lambda x: x is None or isinstance(x, tuple))
    assert axes["encoder/block_0/attention/qkv/kernel"] == ((0,), (1, 2, 3))
    assert axes["encoder/block_0/attention/projection/kernel"] == ((0, 1), (2,))
    assert axes["encoder/block_0/feed_forward/expand/kernel"] == ((0,), (1,))
    assert axes["encoder/embedding/projection/kernel"] == ((0, 1, 2, 3), (4,))
    assert axes["decoder/stage_3/fuse_0/conv/kernel"] == ((0, 1, 2, 3), (4,))
    assert axes["decoder/stage_3/upsample/kernel"] == ((3,), (0, 1, 2, 4))
    assert axes["decoder/stage_1/skip_1/deconv/kernel"] == ((3,), (0, 1, 2, 4))
    assert axes["decoder/head/kernel"] is None
    # MONAI's skips that are a single transposed convolution have its kernel themselves.
    monai = {"decoder": {"stage_1": {"skip_0": {"kernel": jnp.ones((2, 2, 2, 12, 4))}}}}
    assert matrices(monai)["decoder"]["stage_1"]["skip_0"]["kernel"] == ((3,), (0, 1, 2, 4))
    for name, leaf in by_name(params).items():
        found = axes[name]
        assert (found is None) == (not name.endswith("/kernel") or "/head/" in name), name
        if found is not None:
            assert sorted(found[0] + found[1]) == list(range(len(leaf.shape))), name


def test_muon_makes_updates_of_kernels_orthogonal_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 3, 4, 6), "bias": (6,)},
        "head": {"kernel": (1, 1, 1, 6, 2)},
    }
    params, gradients = (
        jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(2)
    )
    # One direction of the gradient is much larger than the others.
    gradients["conv"]["kernel"] += 10

    def updates(tx):
        return tx.update(gradients, tx.init(params), params)[0]

    options = {"weight_decay": 0.5, "clip_norm": 1e6, "optimizer": "muon"}
    ours = updates(make_optimizer(lambda count: 0.1, **options))
    plain = updates(optax.adamw(0.1, weight_decay=0.5, mask=decay_mask, nesterov=True))
    for name, leaf in (("head", "kernel"), ("conv", "bias")):
        np.testing.assert_allclose(ours[name][leaf], plain[name][leaf], rtol=1e-5)
    ours["conv"]["kernel"] += 0.1 * 0.5 * params["conv"]["kernel"]

    def values(x):
        return np.linalg.svd(np.asarray(x["conv"]["kernel"]).reshape(-1, 6), compute_uv=False)

    given, found = values(gradients), values(ours)
    assert given[0] > 20 * given[-1]
    assert found[0] < 2 * found[-1]
    root_mean_square = np.sqrt(np.square(ours["conv"]["kernel"]).mean())
    assert root_mean_square == pytest.approx(0.1 * 0.2, rel=0.2)
    assert np.vdot(ours["conv"]["kernel"], gradients["conv"]["kernel"]) < 0
