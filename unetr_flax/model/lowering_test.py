"""Tests of the two lowerings of whole models, with and without recomputation."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_image, abstract_variables
from unetr_flax.model.encoder import VisionTransformer

CONFIGS = {
    "reference": UNETRConfig.reference(
        (8, 4, 16), 2, 3, 8, patch_size=(8, 4, 16), hidden_size=24, num_layers=4, num_heads=3
    ),
    "monai": UNETRConfig.monai(
        (16, 16, 16), 2, 3, feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2
    ),
}


def random_arrays(cfg):
    """Makes variables and an image in float64."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        noise = rng.standard_normal(shape.shape)
        return 0.5 + np.abs(noise) if path[-1].key in ("var", "scale") else 0.2 * noise

    variables = jax.tree_util.tree_map_with_path(leaf, abstract_variables(UNETR(cfg)))
    return variables, rng.standard_normal((2, *cfg.img_size, cfg.in_channels))


def gradients_of(cfg, variables, x, **fields):
    """Makes a function from parameters to gradients and logits, skips and updated statistics."""
    model = UNETR(cfg, param_dtype=jnp.float64, **fields)

    def loss(params):
        (logits, skips), updated = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            return_skips=True,
            mutable=["batch_stats"],
        )
        return jnp.square(jnp.sin(logits)).mean(), (logits, skips, updated)

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def results(family, lowering, remat):
    """Computes a model's gradients and results, and counts the products in its program."""
    with jax.enable_x64(True):
        variables, x = random_arrays(CONFIGS[family])
        gradients = gradients_of(CONFIGS[family], variables, x, lowering=lowering, remat=remat)
        lowered = gradients.lower(variables["params"])
        # Products are counted in the program before XLA optimizes it.
        return lowered.compile()(variables["params"]), lowered.as_text().count("dot_general")


def assert_same(found, expected, tolerance):
    """Compares arrays, each relative to its largest number or to a thousandth of all."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    found, expected = (jax.tree.leaves(tree) for tree in (found, expected))
    largest = max(np.abs(leaf).max() for leaf in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == jnp.float64
        # The gradients of biases before norms are rounding errors only.
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3 * largest)


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("family", CONFIGS)
def test_plain_definitions_give_the_same_numbers(family, remat):
    (expected_gradients, expected), _ = results(family, "xla", False)
    for lowering in ("auto", "xla"):
        (gradients, values), _ = results(family, lowering, remat)
        assert_same(values, expected, 1e-10)
        assert_same(gradients, expected_gradients, 1e-10)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
@pytest.mark.parametrize("family", CONFIGS)
def test_remat_changes_memory_but_no_number(family, lowering):
    (plain, products), (again, more_products) = (
        results(family, lowering, remat) for remat in (False, True)
    )
    # Recomputation adds products to the program.
    assert more_products > products
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), plain, again)


def dropping_encoders(lowering):
    """Returns an encoder without and with `remat`, its variables and two volumes."""
    cfg = dataclasses.replace(CONFIGS["reference"], img_size=(8, 8, 16), dropout_rate=0.2)
    plain, again = (
        VisionTransformer(cfg, lowering=lowering, stochastic_depth=0.5, remat=remat)
        for remat in (False, True)
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *cfg.img_size, cfg.in_channels)), jnp.float32)
    return plain, again, plain.init(jax.random.key(0), x), x


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_remat_draws_the_random_numbers_of_the_forward_pass_again(lowering):
    plain, again, variables, x = dropping_encoders(lowering)

    def gradients(model):
        def loss(variables):
            rngs = {"dropout": jax.random.key(1)}
            features, _ = model.apply(variables, x, train=True, rngs=rngs)
            return sum(jnp.square(feature).sum() for feature in features)

        return jax.jit(jax.grad(loss))(variables)

    assert_near(gradients(again), gradients(plain), 1e-5)


@pytest.mark.parametrize("lowering", ["auto", "xla"])
def test_gradients_pass_a_vmap_over_masks_and_keys_with_remat(lowering):
    plain, again, variables, x = dropping_encoders(lowering)
    keys = jax.random.split(jax.random.key(1), len(x))
    masks = jnp.stack([jnp.eye(2, dtype=bool), jnp.tri(2, dtype=bool)])

    def gradients(model):
        def loss(variables, x, mask, key):
            rngs = {"dropout": key}
            features, _ = model.apply(variables, x[None], mask, train=True, rngs=rngs)
            return sum(jnp.square(feature).sum() for feature in features)

        both = jax.vmap(loss, (None, 0, 0, 0))
        return jax.jit(jax.grad(lambda variables: both(variables, x, masks, keys).sum()))(variables)

    assert_near(gradients(again), gradients(plain), 1e-5)


def assert_near(found, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("lowering", ["XLA", "", None, "cpu"])
def test_other_lowerings_are_refused_in_one_line(lowering):
    cfg = CONFIGS["reference"]
    model = UNETR(cfg, lowering=lowering)
    with pytest.raises(ValueError, match=r"lowering=.*: must be 'auto' or 'xla'") as error:
        jax.eval_shape(model.init, jax.random.key(0), abstract_image(cfg))
    assert repr(lowering) in str(error.value)
    assert "\n" not in str(error.value)


def primitives(jaxpr):
    """Returns the names of all primitives in a program and in the programs inside it."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: isinstance(p, jax.extend.core.ClosedJaxpr)
        ):
            if hasattr(inner, "eqns"):
                names |= primitives(inner)
    return names


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_plain_lowering_makes_no_choice_of_platform(family, remat):
    def programs(lowering):
        model = UNETR(CONFIGS[family], lowering=lowering, remat=remat)
        x = abstract_image(CONFIGS[family], 2)
        variables = abstract_variables(model)

        def forward(params, variables, x):
            given = {**variables, "params": params}
            return model.apply(given, x, train=True, mutable=["batch_stats"])[0]

        def loss(*given):
            return forward(*given).sum()

        given = variables["params"], variables, x
        return [primitives(jax.make_jaxpr(f)(*given)) for f in (forward, jax.grad(loss))]

    custom = {"platform_index", "custom_vjp_call", "reverse_mode_only"}
    for names in programs("xla"):
        assert "conv_general_dilated" in names
        assert not names & custom
    # The search does find these primitives in the tuned program.
    forward, gradient = programs("auto")
    assert custom & forward >= {"custom_vjp_call"}
    assert "platform_index" in gradient


def test_plain_program_is_the_same_for_all_platforms():
    cfg = CONFIGS["reference"]
    model = UNETR(cfg, lowering="xla")
    traced = jax.jit(model.apply).trace(abstract_variables(model), abstract_image(cfg, 2))
    texts = {
        traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    assert len(texts) == 1
