import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from train.losses import cross_entropy_loss, dice_cross_entropy_loss, soft_dice_loss

CLASSES = 4


def example(dtype=np.float64, spatial=(3, 4, 5)):
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(2, *spatial, CLASSES))).astype(dtype)
    # The last class is in neither volume, class 2 only in the first.
    labels = np.stack([rng.integers(0, 3, spatial), rng.integers(0, 2, spatial)])
    return logits, labels.astype(np.int32)


def torch_dice(logits, labels, include_background):
    probabilities = logits.softmax(-1)
    losses = []
    for sample, target in zip(probabilities, labels, strict=True):
        for k in range(0 if include_background else 1, CLASSES):
            p, g = sample[..., k], (target == k).double()
            losses.append(1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5))
    return torch.stack(losses).mean()


def torch_cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1))


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("spatial", [(3, 4, 5), (7, 2)])
def test_equals_torch_in_value_and_gradient(spatial, include_background):
    logits, labels = example(spatial=spatial)
    their_logits = torch.tensor(logits, requires_grad=True)
    their_labels = torch.tensor(labels, dtype=torch.long)
    theirs = {
        cross_entropy_loss: torch_cross_entropy(their_logits, their_labels),
        soft_dice_loss: torch_dice(their_logits, their_labels, include_background),
    }
    theirs[dice_cross_entropy_loss] = theirs[cross_entropy_loss] + theirs[soft_dice_loss]
    for loss, expected in theirs.items():
        options = {} if loss is cross_entropy_loss else {"include_background": include_background}
        with jax.enable_x64(True):
            function = jax.jit(jax.value_and_grad(lambda x, f=loss, o=options: f(x, labels, **o)))
            value, gradient = function(jnp.asarray(logits))
        assert value.dtype == gradient.dtype == np.float64
        np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
        (expected_gradient,) = torch.autograd.grad(expected, their_logits, retain_graph=True)
        np.testing.assert_allclose(gradient, expected_gradient.numpy(), rtol=1e-12, atol=1e-15)


def test_perfect_prediction_costs_nothing():
    _, labels = example()
    logits = 100 * np.eye(CLASSES, dtype=np.float32)[labels]
    np.testing.assert_allclose(dice_cross_entropy_loss(jnp.asarray(logits), labels), 0, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    logits, labels = example(np.float32)
    half = jnp.asarray(logits, jnp.bfloat16)
    loss = dice_cross_entropy_loss(half, labels)
    assert loss.dtype == jnp.float32
    assert loss == dice_cross_entropy_loss(half.astype(jnp.float32), labels)


def test_large_logits_stay_finite():
    logits, labels = example(np.float32)
    value, gradient = jax.value_and_grad(dice_cross_entropy_loss)(jnp.asarray(1e4 * logits), labels)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_of_any_integer_type(dtype):
    logits, labels = example(np.float32)
    logits = jnp.asarray(logits)
    expected = dice_cross_entropy_loss(logits, labels)
    assert dice_cross_entropy_loss(logits, labels.astype(dtype)) == expected


def test_no_gather_and_no_scatter():
    logits, labels = example(np.float32)
    text = str(jax.make_jaxpr(jax.grad(dice_cross_entropy_loss))(jnp.asarray(logits), labels))
    assert "exp" in text
    assert "gather" not in text
    assert "scatter" not in text


@pytest.mark.parametrize("loss", [cross_entropy_loss, soft_dice_loss, dice_cross_entropy_loss])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((2, 3, 4, 5), (2, 3, 4, 1), r"labels: int32\(2, 3, 4, 1\), must be integers \(2, 3, 4\)"),
        ((2, 3, 4, 1), (2, 3, 4), r"logits: float32\(2, 3, 4, 1\), must be .* K >= 2"),
        ((2, 3), (2,), r"logits: float32\(2, 3\), must be floating \[B, \*spatial, K\]"),
    ],
)
def test_wrong_shapes_are_named(loss, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        loss(jnp.zeros(logits, jnp.float32), jnp.zeros(labels, jnp.int32))


def test_wrong_types_are_named():
    with pytest.raises(ValueError, match=r"labels: float32\(2, 3\), must be integers"):
        dice_cross_entropy_loss(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"logits: int32\(2, 3, 4\), must be floating"):
        dice_cross_entropy_loss(jnp.zeros((2, 3, 4), int), jnp.zeros((2, 3), int))
