"""Scores against MONAI's metrics, on random shapes with anisotropic voxels."""

import numpy as np
import pytest

from unetr_flax.evaluation.scores import evaluate_case

torch = pytest.importorskip("torch")
metrics = pytest.importorskip("monai.metrics")
ndimage = pytest.importorskip("scipy.ndimage")

# MONAI 1.6 passes this deprecated argument itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

# MONAI computes distances in float64 and rounds them to float32.
ROUNDING = 1e-6


def blobs(seed, shape, num_classes):
    """Makes a label map of smooth random regions, several of which touch the border."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((num_classes, *shape)), (0, 2, 2, 1.5))
    return fields.argmax(0).astype(np.int32)


def one_hot(classes, num_classes):
    planes = np.stack([classes == i for i in range(num_classes)])
    return torch.as_tensor(planes[None].astype(np.float32))


def monai_scores(prediction, label, spacing, num_classes, tolerance):
    """Computes the scores of all classes but the background, by name, [K - 1]."""
    computed = {
        "dice": metrics.DiceMetric(include_background=False),
        "iou": metrics.MeanIoU(include_background=False),
        "hd95": metrics.HausdorffDistanceMetric(percentile=95),
        "surface_dice": metrics.SurfaceDiceMetric([tolerance] * (num_classes - 1)),
        "assd": metrics.SurfaceDistanceMetric(symmetric=True),
    }
    pair = one_hot(prediction, num_classes), one_hot(label, num_classes)
    return {
        name: metric(*pair, **({} if name in ("dice", "iou") else {"spacing": spacing}))[0].numpy()
        for name, metric in computed.items()
    }


@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance"),
    [
        ((23, 17, 12), (0.8, 0.9, 5.0), 1.0),
        ((9, 20, 14), (3.0, 0.7, 1.1), 2.1),
        # Distances that are equal to the tolerance but for rounding.
        ((16, 15, 13), (0.3, 0.3, 0.4), 0.9),
    ],
)
def test_scores_equal_monai_s(shape, spacing, tolerance):
    prediction, label = blobs(1, shape, 4), blobs(2, shape, 4)
    label[:5] = prediction[:5]
    ours = evaluate_case(prediction, label, spacing, tolerance=tolerance)
    assert sorted(ours) == [1, 2, 3]
    for name, theirs in monai_scores(prediction, label, spacing, 4, tolerance).items():
        found = [getattr(scores, name) for scores in ours.values()]
        np.testing.assert_allclose(found, theirs, rtol=ROUNDING, err_msg=name)
        assert np.isfinite(found).all()


@pytest.mark.filterwarnings("ignore:the prediction of class")
@pytest.mark.filterwarnings("ignore:the ground truth of class")
def test_monai_drops_what_here_counts():
    label = np.zeros((8, 9, 7), np.int32)
    label[2:5, 3:6, 2:4] = 1
    empty = np.zeros_like(label)
    missed = monai_scores(empty, label, (1.0, 2.0, 3.0), 2, 1.0)
    assert (missed["dice"], missed["surface_dice"], missed["assd"]) == (0, 0, np.inf)
    # MONAI leaves nan out of its means, so HD95 is the mean over the structures that were found.
    assert np.isnan(missed["hd95"])
    assert evaluate_case(empty, label, (1.0, 2.0, 3.0))[1].hd95 == np.inf
    invented = monai_scores(label, empty, (1.0, 2.0, 3.0), 2, 1.0)
    assert np.isnan([invented["dice"], invented["iou"], invented["hd95"]]).all()
    assert evaluate_case(label, empty, (1.0, 2.0, 3.0))[1].dice == 0
