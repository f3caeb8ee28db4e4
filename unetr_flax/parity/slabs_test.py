import pytest
import torch
import torch.nn.functional as F

from unetr_flax.parity import slabs
from unetr_flax.parity.slabs import ConvolutionsInSlabs


@pytest.fixture
def depths(monkeypatch):
    """Lists the depths of the inputs of all convolutions; slabs have 2 planes."""
    found = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.conv3d:
                found.append(args[0].shape[2])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(slabs, "SLAB_BYTES", 2 * 8 * 2 * 4 * 27 * 6 * 5)
    with Spy():
        yield found


@pytest.mark.parametrize(
    ("kernel", "padding", "expected_depths"),
    [(3, 1, [4, 4, 4, 4, 3]), (3, (0, 1, 1), [4, 4, 4, 3]), (3, (1,), [4, 4, 4, 4, 3])],
)
def test_slabs_give_the_same_numbers(depths, kernel, padding, expected_depths):
    x = torch.randn(2, 4, 9, 6, 5, dtype=torch.float64)
    weight = torch.randn(3, 4, kernel, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    expected = F.conv3d(x, weight, bias, padding=padding)
    del depths[:]
    with ConvolutionsInSlabs():
        found = F.conv3d(x, weight, bias, padding=padding)
    assert torch.equal(found, expected)
    assert depths == expected_depths


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv3d(4, 3, 1).double(),
        torch.nn.Conv3d(4, 3, 3, padding=1),
        torch.nn.Conv3d(4, 3, 3, padding="same").double(),
        torch.nn.Conv3d(4, 3, 3, stride=3).double(),
        torch.nn.Conv3d(4, 4, 3, groups=2).double(),
        torch.nn.Conv3d(4, 3, 3, dilation=2).double(),
    ],
    ids=["pointwise", "float32", "same", "stride", "groups", "dilation"],
)
def test_other_convolutions_stay_whole(depths, layer):
    x = torch.randn(2, 4, 9, 6, 5, dtype=layer.weight.dtype)
    with ConvolutionsInSlabs():
        layer(x)
    assert depths == [9]


def test_a_volume_without_a_batch_stays_whole(depths):
    with ConvolutionsInSlabs():
        torch.nn.Conv3d(4, 3, 3).double()(torch.randn(4, 9, 6, 5, dtype=torch.float64))
    assert len(depths) == 1
