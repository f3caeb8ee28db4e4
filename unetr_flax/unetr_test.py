import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from unetr_flax import UNETR, UNETRConfig

CFG = UNETRConfig.reference(
    (32, 16, 48), 2, 3, 8, patch_size=(16, 8, 16), hidden_size=24, num_layers=4, num_heads=3
)


def image(cfg=CFG, batch=2, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (batch, *cfg.img_size, cfg.in_channels), dtype)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(UNETR(CFG).init)(jax.random.key(0), image())


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_params(cfg):
    x = jax.ShapeDtypeStruct((1, *cfg.img_size, cfg.in_channels), jnp.float32)
    return jax.eval_shape(UNETR(cfg).init, jax.random.key(0), x)["params"]


def test_the_article_s_counts():
    params = abstract_params(UNETRConfig.reference((128, 128, 128), 1, 4, light_r=4))
    assert count(params) == 92_459_028
    encoder = params["encoder"]
    blocks = [encoder[f"block_{i}"] for i in range(12)]
    assert count(blocks) == 85_054_464
    assert count(blocks[0]["attention"]["qkv"]) == 1_771_776
    assert count(blocks[0]["attention"]["projection"]) == 590_592
    assert count(blocks[0]["feed_forward"]["expand"]) == 2_362_368
    assert count(blocks[0]["feed_forward"]["contract"]) == 2_360_064
    assert count(encoder["embedding"]["projection"]) == 3_146_496
    assert count(encoder["embedding"]["position_embedding"]) == 512 * 768


def test_shapes_of_logits_and_skips(variables):
    logits, skips = UNETR(CFG).apply(variables, image(), return_skips=True)
    assert logits.shape == (2, 32, 16, 48, 3)
    assert [z.shape for z in skips] == [(2, 2 * 2 * 3, 24)] * 4
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(skips))


def test_any_batch_size_gives_each_volume_its_own_result(variables):
    x = image(batch=3)
    apply = jax.jit(UNETR(CFG).apply)
    together = apply(variables, x)
    alone = jnp.concatenate([apply(variables, x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("img_size", "patch_size"),
    [((16, 8, 4), (1, 2, 4)), ((16, 32, 16), (8, 16, 8)), ((32, 48), (16, 8)), ((64,), (16,))],
)
def test_every_patch_size_and_number_of_axes(img_size, patch_size):
    cfg = UNETRConfig.reference(
        img_size, 1, 2, 16, patch_size=patch_size, hidden_size=8, num_layers=4, num_heads=2
    )
    x = image(cfg)
    logits, variables = jax.jit(UNETR(cfg).init_with_output)(jax.random.key(0), x)
    assert logits.shape == (2, *img_size, 2)
    assert variables["params"]["encoder"]["embedding"]["position_embedding"].shape[1] == np.prod(
        [s // p for s, p in zip(img_size, patch_size, strict=True)]
    )


def test_training_mode_changes_only_running_statistics(variables):
    x = image()
    evaluated = UNETR(CFG).apply(variables, x)
    trained, updated = UNETR(CFG).apply(variables, x, train=True, mutable=["batch_stats"])
    assert updated.keys() == {"batch_stats"}
    assert not np.allclose(evaluated, trained)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]),
        jax.tree.leaves(updated["batch_stats"]),
        strict=True,
    ):
        assert not np.array_equal(before, after)


def test_dropout_needs_and_follows_its_rng():
    cfg = UNETRConfig.reference(
        (16, 16, 16),
        1,
        2,
        16,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        dropout_rate=0.5,
        patch_size=8,
    )
    model, x = UNETR(cfg), image(cfg)
    variables = model.init(jax.random.key(0), x)

    def train(seed):
        return model.apply(
            variables,
            x,
            train=True,
            rngs={"dropout": jax.random.key(seed)},
            mutable=["batch_stats"],
        )[0]

    assert np.array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))
    assert np.array_equal(model.apply(variables, x), model.apply(variables, x))
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, x, train=True, mutable=["batch_stats"])


def test_dropout_reaches_embeddings_attention_and_feed_forward():
    cfg = UNETRConfig.reference(
        (16, 16, 16), 1, 2, 16, hidden_size=16, num_layers=4, num_heads=2, dropout_rate=0.5
    )
    model, x = UNETR(cfg), image(cfg)
    variables = model.init(jax.random.key(0), x)
    _, state = model.apply(
        variables,
        x,
        train=True,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable=["batch_stats", "intermediates"],
    )
    dropped = jax.tree.leaves(state["intermediates"])
    assert len(dropped) == 1 + 2 * 4
    assert all((d == 0).mean() > 0.2 for d in dropped)


def test_mask_cuts_tokens_off(variables):
    model, x = UNETR(CFG), image()
    keep = np.ones(CFG.num_patches, bool)
    keep[-1] = False
    mask = jnp.asarray(keep[None, None, None])
    changed = x.at[:, 16:, 8:, 32:].add(1.0)  # exactly the last patch
    _, skips = model.apply(variables, x, mask=mask, return_skips=True)
    _, skips_changed = model.apply(variables, changed, mask=mask, return_skips=True)
    _, unmasked = model.apply(variables, changed, return_skips=True)
    np.testing.assert_array_equal(skips[-1][:, :-1], skips_changed[-1][:, :-1])
    assert not np.array_equal(skips[-1][:, -1], skips_changed[-1][:, -1])
    assert not np.allclose(skips[-1][:, :-1], unmasked[-1][:, :-1])


# Flax's LayerNorm itself relies on promotion for mixed precision.
@jax.numpy_dtype_promotion("standard")
def test_bfloat16_computes_close_to_float32_with_float32_parameters(variables):
    x = image()
    model = UNETR(CFG, dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.result_type, model.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.result_type, variables
    )
    logits, skips = jax.jit(lambda v, x: model.apply(v, x, return_skips=True))(variables, x)
    assert {logits.dtype, *(z.dtype for z in skips)} == {jnp.dtype(jnp.bfloat16)}
    exact = UNETR(CFG).apply(variables, x)
    assert jnp.abs(logits.astype(jnp.float32) - exact).max() < 0.1 * jnp.abs(exact).max()


def test_gradients_reach_every_parameter(variables):
    def loss(params):
        return (UNETR(CFG).apply({**variables, "params": params}, image()) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


def test_initial_weights_follow_pytorch_s_distribution(variables):
    kernel = variables["params"]["encoder"]["block_0"]["feed_forward"]["expand"]["kernel"]
    bound = 24**-0.5
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.std(kernel), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize(
    "shape", [(2, 32, 16, 47, 2), (2, 32, 16, 48, 1), (32, 16, 48, 2), (2, 2, 32, 16, 48)]
)
def test_wrong_input_shape_is_refused(variables, shape):
    with pytest.raises(ValueError, match=r"x: shape \(.*must be \(batch, 32, 16, 48, 2\)"):
        UNETR(CFG).apply(variables, jnp.zeros(shape))


def test_mask_must_be_boolean(variables):
    mask = jnp.ones((1, 1, 1, CFG.num_patches))
    with pytest.raises(ValueError, match="mask: dtype float32, must be bool"):
        UNETR(CFG).apply(variables, image(), mask=mask)


def test_nnx_bridge_computes_differentiates_and_updates_the_same():
    x = image()
    model = bridge.ToNNX(UNETR(CFG), rngs=nnx.Rngs(0)).lazy_init(x)

    def variables():
        return {
            "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
        }

    expected, updated = UNETR(CFG).apply(variables(), x, train=True, mutable=["batch_stats"])
    logits = nnx.jit(lambda m, x: m(x))(model, x)
    np.testing.assert_allclose(logits, UNETR(CFG).apply(variables(), x), rtol=1e-4, atol=1e-5)

    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
    assert count(grads) == count(variables()["params"])

    np.testing.assert_array_equal(model(x, train=True, mutable=["batch_stats"]), expected)
    jax.tree.map(np.testing.assert_array_equal, variables()["batch_stats"], updated["batch_stats"])
