"""JAX's transformations of whole models, in both families."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from unetr_flax import UNETR, UNETRConfig
from unetr_flax.model.abstract import abstract_variables

SMALL = {
    "reference": UNETRConfig.reference(
        (16, 8, 8), 1, 2, 32, patch_size=8, hidden_size=8, num_layers=4, num_heads=2
    ),
    "monai": UNETRConfig.monai(16, 1, 2, feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2),
}
USUAL = {
    "reference": UNETRConfig.reference((96, 96, 96), 1, 4),
    "monai": UNETRConfig.monai(96, 1, 14),
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}

slow = pytest.mark.slow
CASES = [
    "reference-float64",
    "monai-float32",
    pytest.param("reference-float32", marks=slow),
    pytest.param("monai-float64", marks=slow),
]
# Programs of gradients take minutes to compile.
ONE_CASE = [
    "reference-float64",
    *(
        pytest.param(name, marks=slow)
        for name in ("reference-float32", "monai-float32", "monai-float64")
    ),
]
of_gradients = pytest.mark.parametrize("case", ONE_CASE, indirect=True)


class Case:
    """A small model of each lowering with random variables and two volumes."""

    def __init__(self, family, dtype):
        cfg, rng = SMALL[family], np.random.default_rng(0)
        self.tolerance = TOLERANCE[dtype]
        self.model, self.plain = (
            UNETR(cfg, param_dtype=jnp.dtype(dtype), lowering=lowering)
            for lowering in ("auto", "xla")
        )

        def random(shape):
            return jnp.asarray(0.3 * rng.standard_normal(shape.shape), dtype)

        shapes = abstract_variables(self.model)
        self.variables = jax.tree.map(random, shapes)
        if "batch_stats" in shapes:  # variances are positive
            self.variables["batch_stats"] = jax.tree.map(jnp.abs, self.variables["batch_stats"])
        self.direction = jax.tree.map(random, shapes["params"])
        self.image = jnp.asarray(rng.standard_normal((2, *cfg.img_size, cfg.in_channels)), dtype)
        self.logits = jax.jit(self.model.apply)(self.variables, self.image)

    def loss(self, params, image, model=None, train=False):
        given = {**self.variables, "params": params}
        options = {"train": True, "mutable": ["batch_stats"]} if train else {}
        logits = (model or self.model).apply(given, image, **options)
        return jnp.square(logits[0] if train else logits).mean()

    def along(self, step, model=None):
        """The loss in training mode after a step in a fixed direction."""
        params = jax.tree.map(lambda p, d: p + step * d, self.variables["params"], self.direction)
        return self.loss(params, self.image, model, train=True)

    def twice_forward(self):
        """The second derivative of `along` at 0, by forward mode of the plain lowering."""
        twice = jax.jacfwd(jax.jacfwd(lambda step: self.along(step, self.plain)))
        return jax.jit(twice)(jnp.zeros((), self.image.dtype))

    def in_float64(self):
        """A copy that computes in float64, to be called with `jax.enable_x64`."""
        case = copy.copy(self)
        case.plain = UNETR(self.plain.config, param_dtype=jnp.float64, lowering="xla")
        case.variables, case.direction, case.image = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64),
            (self.variables, self.direction, self.image),
        )
        return case

    def assert_close(self, a, b):
        """Compares trees, relative to the largest number: some gradients are only rounding."""
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(b))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.shape == y.shape
            assert np.abs(x - y).max() <= self.tolerance * largest


@pytest.fixture(scope="module", params=CASES)
def case(request):
    family, dtype = request.param.split("-")
    with jax.enable_x64(dtype == "float64"):
        yield Case(family, dtype)


def test_vmap_over_the_batch(case):
    def one(volume):
        return case.model.apply(case.variables, volume[None])[0]

    case.assert_close(jax.jit(jax.vmap(one))(case.image), case.logits)


def test_vmap_over_variables_is_an_ensemble(case):
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), case.variables)
    both = jax.jit(jax.vmap(case.model.apply, (0, None)))(ensemble, case.image)
    halves = jax.tree.map(lambda leaf: leaf / 2, case.variables)
    case.assert_close(both[0], case.logits)
    case.assert_close(both[1], jax.jit(case.model.apply)(halves, case.image))


def test_flax_vmap_is_an_ensemble_too(case):
    axes = {"params": 0, "batch_stats": 0}
    model = nn.vmap(
        UNETR, in_axes=None, axis_size=2, variable_axes=axes, split_rngs={"params": True}
    )
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), case.variables)
    apply = jax.jit(model(case.model.config, param_dtype=case.image.dtype).apply)
    case.assert_close(apply(ensemble, case.image)[1], case.logits)


@of_gradients
def test_vmap_of_grad_gives_the_gradient_of_each_volume(case):
    params = case.variables["params"]
    each = jax.jit(jax.vmap(jax.grad(case.loss), (None, 0)))(params, case.image[:, None])
    grad = jax.jit(jax.grad(case.loss))
    case.assert_close(
        each, jax.tree.map(lambda *g: jnp.stack(g), *(grad(params, x[None]) for x in case.image))
    )


@slow
@of_gradients
def test_checkpoint_and_scan_change_no_gradient(case):
    params = case.variables["params"]
    expected = jax.jit(jax.grad(case.loss))(params, case.image)
    case.assert_close(jax.jit(jax.grad(jax.checkpoint(case.loss)))(params, case.image), expected)

    def scanned(params, image):
        def add(total, volume):
            return total + case.loss(params, volume[None]), None

        return jax.lax.scan(add, jnp.zeros((), image.dtype), image)[0] / len(image)

    case.assert_close(jax.jit(jax.grad(scanned))(params, case.image), expected)


def test_an_empty_batch(case):
    empty = case.image[:0]
    assert jax.jit(case.model.apply)(case.variables, empty).shape == (0, *case.logits.shape[1:])

    def total(params):
        return case.model.apply({**case.variables, "params": params}, empty).sum()

    for grad in jax.tree.leaves(jax.jit(jax.grad(total))(case.variables["params"])):
        assert not grad.any()


@of_gradients
def test_forward_mode_is_that_of_the_plain_lowering_and_agrees_with_reverse_mode(case):
    zero = jnp.zeros((), case.image.dtype)
    slope = jax.jit(jax.grad(case.along))(zero)
    _, tangent = jax.jit(
        lambda step: jax.jvp(lambda s: case.along(s, case.plain), (step,), (jnp.ones_like(step),))
    )(zero)
    case.assert_close(tangent, slope)
    linear = jax.linearize(jax.jit(lambda s: case.along(s, case.plain)), zero)[1]
    case.assert_close(linear(jnp.ones_like(zero)), slope)
    case.assert_close(jax.jacfwd(jax.jit(lambda s: case.along(s, case.plain)))(zero), slope)


@pytest.mark.parametrize("name", ["jvp", "linearize", "jacfwd"])
def test_forward_mode_of_the_tuned_lowering_names_the_plain_one(case, name):
    zero = jnp.zeros((), case.image.dtype)
    along = jax.jit(case.along)
    forward = {
        "jvp": lambda: jax.jvp(along, (zero,), (zero,)),
        "linearize": lambda: jax.linearize(along, zero)[1](zero),
        "jacfwd": lambda: jax.jacfwd(along)(zero),
    }
    with pytest.raises(TypeError, match='UNETR\\(cfg, lowering="xla"\\) has both') as error:
        forward[name]()
    assert "\n" not in str(error.value)


@slow
@of_gradients
def test_second_derivatives_by_reverse_mode_are_those_by_forward_mode(case):
    zero = jnp.zeros((), case.image.dtype)
    twice_reverse = jax.jit(jax.grad(jax.grad(case.along)))(zero)
    twice_forward = case.twice_forward()
    if case.image.dtype == jnp.float64:
        case.assert_close(twice_reverse, twice_forward)
    else:
        # Float32 leaves 3 to 4 digits of a second derivative, so float64's is the truth here.
        with jax.enable_x64(True):
            truth = np.float64(case.in_float64().twice_forward())
        error, plain_error = (abs(np.float64(x) - truth) for x in (twice_reverse, twice_forward))
        assert error <= case.tolerance * abs(truth) + plain_error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", USUAL)
# Flax's LayerNorm itself relies on promotion for mixed precision.
@jax.numpy_dtype_promotion("standard")
def test_whole_models_are_exported_with_a_symbolic_batch_for_every_platform(family, dtype):
    cfg = USUAL[family]
    model = UNETR(cfg, dtype=dtype)
    (batch,) = export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, *cfg.img_size, cfg.in_channels), jnp.float32)
    exporting = export.export(jax.jit(model.apply), platforms=["cpu", "cuda", "tpu"])
    exported = exporting(abstract_variables(model), image)
    assert exported.out_avals[0].shape == (batch, *cfg.img_size, cfg.out_channels)
    assert exported.platforms == ("cpu", "cuda", "tpu")
