import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model import encoder
from unetr_flax.model.abstract import abstract_variables

CFG = UNETRConfig.reference(
    (16, 8, 32), 2, 3, 8, patch_size=(8, 4, 16), hidden_size=24, num_layers=4, num_heads=3
)


def image(cfg=CFG, batch=2):
    shape = (batch, *cfg.img_size, cfg.in_channels)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def assert_close(a, b, tolerance=1e-5):
    """Compares arrays; the tolerance is relative to the largest number of b."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def random_variables(cfg):
    """Makes variables of the right shapes, without compiling the initializers."""
    shapes = abstract_variables(UNETR(cfg))
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        return 0.5 + np.abs(noise) if path[-1].key in ("var", "scale") else 0.2 * noise

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module")
def variables():
    return random_variables(CFG)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_article_s_counts():
    params = abstract_variables(UNETR(UNETRConfig.reference((128, 128, 128), 1, 4, light_r=4)))[
        "params"
    ]
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
    apply = jax.jit(lambda v, x: UNETR(CFG).apply(v, x, return_skips=True))
    logits, skips = apply(variables, image())
    assert logits.shape == (2, 16, 8, 32, 3)
    assert [z.shape for z in skips] == [(2, 2 * 2 * 2, 24)] * 4
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(skips))


def test_any_batch_size_gives_each_volume_its_own_result(variables):
    x = image(batch=3)
    apply = jax.jit(UNETR(CFG).apply)
    together = apply(variables, x)
    alone = jnp.concatenate([apply(variables, x[i : i + 1]) for i in range(3)])
    assert_close(together, alone)


@pytest.mark.parametrize(
    ("img_size", "patch_size"),
    [((16, 8, 4), (1, 2, 4)), ((16, 32, 16), (8, 16, 8)), ((32, 48), (16, 8)), ((64,), (16,))],
)
def test_every_patch_size_and_number_of_axes(img_size, patch_size):
    cfg = UNETRConfig.reference(
        img_size, 1, 2, 16, patch_size=patch_size, hidden_size=8, num_layers=4, num_heads=2
    )
    init = UNETR(cfg).init_with_output
    logits, variables = jax.eval_shape(init, jax.random.key(0), image(cfg))
    assert logits.shape == (2, *img_size, 2)
    assert variables["params"]["encoder"]["embedding"]["position_embedding"].shape[1] == np.prod(
        [s // p for s, p in zip(img_size, patch_size, strict=True)]
    )


def test_training_mode_changes_only_running_statistics(variables):
    x = image()
    evaluated = jax.jit(UNETR(CFG).apply)(variables, x)
    train = jax.jit(lambda v, x: UNETR(CFG).apply(v, x, train=True, mutable=["batch_stats"]))
    trained, updated = train(variables, x)
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


@pytest.mark.parametrize("jit_blocks", [False, True])
def test_dropout_reaches_everything_and_follows_its_rng(jit_blocks):
    cfg = dataclasses.replace(CFG, dropout_rate=0.5)
    model, x, variables = UNETR(cfg, jit_blocks=jit_blocks), image(cfg), random_variables(cfg)

    @jax.jit
    def train(key):
        return model.apply(
            variables,
            x,
            train=True,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            mutable=["batch_stats", "intermediates"],
        )

    logits, state = train(jax.random.key(1))
    dropped = jax.tree.leaves(state["intermediates"])
    # Dropout acts on the embeddings, and in each block on attention weights and hidden units.
    assert len(dropped) == 1 + 2 * cfg.num_layers
    assert all((d == 0).mean() > 0.2 for d in dropped)
    masks = [d == 0 for d in dropped]
    assert not any(
        a.shape == b.shape and np.array_equal(a, b) for a, b in itertools.combinations(masks, 2)
    )
    assert np.array_equal(logits, train(jax.random.key(1))[0])
    assert not np.array_equal(logits, train(jax.random.key(2))[0])
    with pytest.raises(Exception, match="dropout"):
        model.apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_transformer_blocks_are_traced_once_if_asked_for(monkeypatch, lowering):
    norms = []

    def layer_norm(*args, name, **fields):
        norms.append(name)
        return given(*args, name=name, **fields)

    given = encoder.layer_norm
    # No other test has traced blocks of this size.
    cfg = dataclasses.replace(CFG, mlp_dim=20)
    variables, x = random_variables(cfg), jnp.asarray(image(cfg))
    monkeypatch.setattr(encoder, "layer_norm", layer_norm)
    for jit_blocks, blocks in ((True, 1), (False, cfg.num_layers)):
        norms.clear()
        model = UNETR(cfg, jit_blocks=jit_blocks, lowering=lowering)
        jax.eval_shape(model.apply, variables, x)
        assert norms == blocks * ["norm1", "norm2"]


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_that_are_traced_once_have_the_same_parameters_and_numbers(variables, remat):
    x = image()
    model, traced_once = (UNETR(CFG, jit_blocks=each, remat=remat) for each in (False, True))
    assert abstract_variables(traced_once) == abstract_variables(model)
    assert_close(jax.jit(traced_once.apply)(variables, x), jax.jit(model.apply)(variables, x))


def test_stochastic_depth_drops_branches_of_later_blocks_in_training_only(variables):
    scales = np.asarray(encoder.branch_scales(jax.random.key(0), 3, 4000, 0.4))
    for scale, rate in zip(scales, (0, 0.2, 0.4), strict=True):
        assert set(np.unique(scale)) <= {0, np.float32(1) / np.float32(1 - rate)}
        np.testing.assert_allclose((scale == 0).mean(1), rate, atol=0.03)
    model = encoder.VisionTransformer(CFG, jit_blocks=True, stochastic_depth=0.99)

    @functools.partial(jax.jit, static_argnums=0)
    def features(train):
        params = {"params": variables["params"]["encoder"]}
        return model.apply(params, image(), train=train, rngs={"dropout": jax.random.key(1)})[0]

    plain, dropped = features(False), features(True)
    assert_close(dropped[0], plain[0])
    assert not np.allclose(dropped[-1], plain[-1])


def test_mask_cuts_tokens_off(variables):
    x = image()
    keep = np.ones(CFG.num_patches, bool)
    keep[-1] = False
    changed = x.copy()
    # Exactly the voxels of the last patch change.
    changed[:, 8:, 4:, 16:] += 1.0
    encode = jax.jit(
        lambda x, mask: UNETR(CFG).apply(variables, x, mask=mask, return_skips=True)[1][-1]
    )
    mask, everything = keep[None, None, None], np.ones((1, 1, 1, CFG.num_patches), bool)
    before, after = encode(x, mask), encode(changed, mask)
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert not np.array_equal(before[:, -1], after[:, -1])
    assert not np.allclose(before[:, :-1], encode(changed, everything)[:, :-1])


# In evaluation, the decoder's BatchNorm promotes bfloat16 with its statistics.
@jax.numpy_dtype_promotion("standard")
def test_bfloat16_computes_close_to_float32_with_float32_parameters(variables):
    x = image()
    model = UNETR(CFG, dtype=jnp.bfloat16)
    shapes = abstract_variables(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    logits, skips = jax.jit(lambda v, x: model.apply(v, x, return_skips=True))(variables, x)
    assert {logits.dtype, *(z.dtype for z in skips)} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.jit(UNETR(CFG).apply)(variables, x)
    assert jnp.abs(logits.astype(jnp.float32) - exact).max() < 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_the_residual_stream_keeps_the_precision_of_the_parameters(param_dtype):
    model = UNETR(CFG, dtype=jnp.bfloat16, param_dtype=param_dtype)
    x = jax.ShapeDtypeStruct((1, *CFG.img_size, CFG.in_channels), param_dtype)

    def blocks(variables, x):
        _, state = model.apply(variables, x, capture_intermediates=True)
        return {k: v for k, v in state["intermediates"]["encoder"].items() if "block" in k}

    with jax.numpy_dtype_promotion("standard"):
        found = jax.eval_shape(blocks, abstract_variables(model), x)
    outputs = [found[f"block_{i}"]["__call__"][0] for i in range(CFG.num_layers)]
    assert {output.dtype for output in outputs} == {jnp.dtype(param_dtype)}


def test_gradients_reach_every_parameter(variables):
    def loss(params):
        return (UNETR(CFG).apply({**variables, "params": params}, image()) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


def test_initial_weights_follow_pytorch_s_distribution():
    module = encoder.FeedForward(CFG)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 24)))
    kernel = variables["params"]["expand"]["kernel"]
    bound = 24**-0.5
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(np.std(kernel), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize(
    "shape", [(2, 16, 8, 31, 2), (2, 16, 8, 32, 1), (16, 8, 32, 2), (2, 2, 16, 8, 32)]
)
def test_wrong_input_shape_is_refused(variables, shape):
    with pytest.raises(ValueError, match=r"x: shape \(.*must be \(batch, 16, 8, 32, 2\)"):
        UNETR(CFG).apply(variables, jnp.zeros(shape))


def test_mask_must_be_boolean(variables):
    mask = jnp.ones((1, 1, 1, CFG.num_patches))
    with pytest.raises(ValueError, match="mask: dtype float32, must be bool"):
        UNETR(CFG).apply(variables, image(), mask=mask)


@pytest.mark.parametrize("size", [(3, 1), (1, CFG.num_heads + 1), (1, 1, 1)])
def test_mask_must_be_broadcastable(variables, size):
    mask = jnp.ones((*size, CFG.num_patches, CFG.num_patches), bool)
    with pytest.raises(ValueError, match=r"mask: shape \(.*\), must be broadcastable to \(2, "):
        UNETR(CFG).apply(variables, image(), mask=mask)


def test_nnx_bridge_computes_differentiates_and_updates_the_same():
    x = image()
    model = nnx.jit(lambda: nnx.bridge.ToNNX(UNETR(CFG), rngs=nnx.Rngs(0)).lazy_init(x))()

    def variables():
        return {
            "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
        }

    logits = nnx.jit(lambda m, x: m(x))(model, x)
    expected = jax.jit(UNETR(CFG).apply)(variables(), x)
    assert_close(logits, expected)

    grads = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).mean()))(model)
    assert count(grads) == count(variables()["params"])

    train = jax.jit(lambda v, x: UNETR(CFG).apply(v, x, train=True, mutable=["batch_stats"]))
    expected, updated = train(variables(), x)
    logits = nnx.jit(lambda m, x: m(x, train=True, mutable=["batch_stats"]))(model, x)
    assert_close(logits, expected)
    for ours, theirs in zip(
        jax.tree.leaves(variables()["batch_stats"]),
        jax.tree.leaves(updated["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_remat_needs_less_memory_on_cpu_too():
    # XLA:CPU drops the barriers of jax.checkpoint, which alone would save no memory.
    cfg = UNETRConfig.reference(
        (48, 32, 32), 1, 2, 8, hidden_size=16, num_layers=4, num_heads=2, dropout_rate=0.1
    )
    x = jax.ShapeDtypeStruct((1, *cfg.img_size, 1), jnp.float32)
    variables = abstract_variables(UNETR(cfg))

    def temporary(remat):
        def loss(params, stats, x, key):
            logits, _ = UNETR(cfg, remat=remat).apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return jnp.square(logits).mean()

        step = jax.jit(jax.grad(loss)).lower(
            variables["params"], variables["batch_stats"], x, jax.random.key(0)
        )
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.85 * temporary(False)
