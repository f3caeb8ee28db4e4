import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from monai import losses as monai_losses

from train.data.targets import IGNORED
from train.losses import (
    LOSSES,
    cross_entropy_loss,
    dice_cross_entropy_loss,
    dice_focal_loss,
    focal_loss,
    make_loss,
    make_target_loss,
    soft_dice_loss,
)

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


OPTIONS = [
    {},
    {"include_background": False},
    {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6},
    {"batch": True},
    {"class_weights": (0.5, 1.0, 2.0, 3.0)},
    {"class_weights": (0.5, 1.0, 2.0, 3.0), "include_background": False, "batch": True},
]


def region_example(channels):
    """Makes logits and overlapping masks [B, *spatial, channels]; the last is empty at times."""
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(2, 3, 4, 5, channels))
    masks = rng.random(logits.shape) < 0.4
    masks[0, ..., -1] = False
    return logits, masks.astype(np.int32)


def channels_first(array):
    return torch.tensor(np.moveaxis(array, -1, 1))


def check_against_torch(loss, theirs, logits, labels, their_labels):
    """Compares value and gradient of losses in float64."""
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits), jnp.asarray(labels))
    their_logits = channels_first(logits).requires_grad_()
    expected = theirs(their_logits, their_labels)
    (expected_gradient,) = torch.autograd.grad(expected, their_logits)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    expected_gradient = np.moveaxis(expected_gradient.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-15)


def monai_options(options):
    weights = options.get("class_weights")
    kept = {name: x for name, x in options.items() if name != "class_weights"}
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return kept, weights


@pytest.mark.parametrize("options", OPTIONS)
def test_softmax_equals_monai_in_value_and_gradient(options, monkeypatch):
    # MONAI makes one-hot labels in float32, whose squares it would sum in float32.
    double = functools.partial(monai_losses.dice.one_hot, dtype=torch.float64)
    monkeypatch.setattr(monai_losses.dice, "one_hot", double)
    kept, weights = monai_options(options)
    logits, labels = example()
    theirs = monai_losses.DiceCELoss(softmax=True, to_onehot_y=True, weight=weights, **kept)
    ours = make_loss("dice_cross_entropy", **options)
    check_against_torch(ours, theirs, logits, labels, torch.tensor(labels)[:, None])


@pytest.mark.filterwarnings("ignore:single channel prediction")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("channels", [1, 4])
def test_sigmoid_equals_monai_in_value_and_gradient(channels, options):
    kept, weights = monai_options(options)
    weights = None if weights is None else weights[:channels]
    logits, masks = region_example(channels)
    if channels == 1:
        theirs = monai_losses.DiceCELoss(sigmoid=True, weight=weights, **kept)
    else:
        # DiceCELoss adds a softmax's cross-entropy to the Dice of regions; ours is the binary one.
        shown = slice(0 if kept.get("include_background", True) else 1, None)
        dice = monai_losses.DiceLoss(
            sigmoid=True, weight=None if weights is None else weights[shown], **kept
        )
        positive = None if weights is None else weights.reshape(channels, 1, 1, 1)
        cross_entropy = torch.nn.BCEWithLogitsLoss(pos_weight=positive)

        def theirs(x, y):
            return dice(x, y) + cross_entropy(x, y)

    options = options if weights is None else options | {"class_weights": weights.tolist()}
    ours = make_loss("dice_cross_entropy", sigmoid=True, **options)
    check_against_torch(ours, theirs, logits, masks, channels_first(masks).double())


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 3.0)])
def test_dice_focal_equals_monai(sigmoid, weights):
    activation = {"sigmoid": True} if sigmoid else {"softmax": True}
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    dice = monai_losses.DiceLoss(to_onehot_y=not sigmoid, weight=tensor, **activation)
    onehot = {"to_onehot_y": not sigmoid, "use_softmax": not sigmoid}
    focal = monai_losses.FocalLoss(weight=tensor, **onehot)
    # MONAI computes the focal loss in float32.
    focal.forward = functools.partial(in_float64, focal.forward)
    logits, labels = region_example(CLASSES) if sigmoid else example()
    their_labels = channels_first(labels) if sigmoid else torch.tensor(labels)[:, None]
    check_against_torch(
        functools.partial(dice_focal_loss, sigmoid=sigmoid, class_weights=weights),
        lambda x, y: dice(x, y.double()) + focal(x, y.double()),
        logits,
        labels,
        their_labels,
    )


def in_float64(forward, *args):
    """Runs a function with `Tensor.float` meaning float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return forward(*args)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_voxels_count_in_nothing(name, sigmoid):
    logits, labels = region_example(CLASSES) if sigmoid else example()
    labels[:, :, -1] = 255
    options = {"sigmoid": sigmoid, "class_weights": (0.5, 1.0, 2.0, 3.0)}
    loss = make_loss(name, ignore_label=255, **options)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32), labels)
    kept = make_loss(name, **options)(
        jnp.asarray(logits[:, :, :-1], jnp.float32), labels[:, :, :-1]
    )
    np.testing.assert_allclose(value, kept, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, :, -1], 0)
    assert np.abs(gradient).max() > 0
    nothing = loss(jnp.asarray(logits, jnp.float32), np.full_like(labels, 255))
    assert np.isfinite(nothing)


def test_targets_of_regions_are_bits_of_a_number():
    logits, masks = region_example(3)
    targets = (masks * 2 ** np.arange(3)).sum(-1).astype(np.int32)
    targets[:, :, -1], masks[:, :, -1] = IGNORED, IGNORED
    logits = jnp.asarray(logits, jnp.float32)
    ours = make_target_loss("dice_cross_entropy", has_regions=True)(logits, targets)
    expected = dice_cross_entropy_loss(logits, masks, sigmoid=True, ignore_label=IGNORED)
    assert ours == expected


def test_targets_of_classes_may_be_ignored():
    logits, labels = example(np.float32)
    labels[:, :, -1] = IGNORED
    ours = make_target_loss("dice", has_regions=False, batch=True)(jnp.asarray(logits), labels)
    options = {"batch": True, "ignore_label": IGNORED}
    assert ours == soft_dice_loss(jnp.asarray(logits), labels, **options)


def test_the_cross_entropy_of_ignored_voxels_is_torch_s():
    logits, labels = example()
    labels[:, :, -1] = 255
    check_against_torch(
        functools.partial(cross_entropy_loss, ignore_label=255),
        functools.partial(torch.nn.functional.cross_entropy, ignore_index=255),
        logits,
        labels,
        torch.tensor(labels, dtype=torch.long),
    )


def test_weights_must_be_one_per_channel():
    logits, labels = example(np.float32)
    with pytest.raises(ValueError, match="class_weights: 2 numbers, must be one for each of 4"):
        soft_dice_loss(jnp.asarray(logits), labels, class_weights=(1.0, 2.0))


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


@pytest.mark.parametrize("loss", [dice_cross_entropy_loss, focal_loss])
def test_no_gather_and_no_scatter(loss):
    logits, labels = example(np.float32)
    text = str(jax.make_jaxpr(jax.grad(loss))(jnp.asarray(logits), labels))
    assert "exp" in text
    assert "gather" not in text
    assert "scatter" not in text


@pytest.mark.parametrize("loss", LOSSES.values())
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
