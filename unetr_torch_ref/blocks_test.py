import pytest
import torch
from torch import nn

from unetr_torch_ref import Conv3DBlock, Deconv3DBlock, SingleConv3DBlock, SingleDeconv3DBlock


def types(module):
    return [type(m) for m in module.block]


def test_parts_of_the_blocks_in_order():
    assert types(Conv3DBlock(2, 3)) == [SingleConv3DBlock, nn.BatchNorm3d, nn.ReLU]
    assert types(Deconv3DBlock(2, 3)) == [
        SingleDeconv3DBlock,
        SingleConv3DBlock,
        nn.BatchNorm3d,
        nn.ReLU,
    ]


@pytest.mark.parametrize("stride", [2, (1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("block", [SingleDeconv3DBlock, Deconv3DBlock])
def test_deconvolutions_multiply_each_axis_by_its_stride(block, stride):
    factors = (stride,) * 3 if isinstance(stride, int) else stride
    y = block(4, 5, stride=stride)(torch.randn(2, 4, 3, 5, 2))
    assert y.shape == (2, 5, *(s * f for s, f in zip((3, 5, 2), factors, strict=True)))


def test_deconvolution_writes_one_kernel_per_voxel():
    block = SingleDeconv3DBlock(1, 1, (1, 2, 1)).double()
    x = torch.randn(2, 1, 2, 3, 2, dtype=torch.float64)
    kernel, bias = block.block.weight[0, 0, 0, :, 0], block.block.bias
    expected = torch.stack([x * kernel[0], x * kernel[1]], dim=4).reshape(2, 1, 2, 6, 2) + bias
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("block", [SingleConv3DBlock, Conv3DBlock])
def test_convolutions_keep_the_size(block, kernel_size):
    y = block(4, 5, kernel_size)(torch.randn(2, 4, 3, 5, 2))
    assert y.shape == (2, 5, 3, 5, 2)


def test_norms_use_batch_statistics_only_in_training():
    block = Conv3DBlock(2, 3)
    x = torch.randn(2, 2, 3, 5, 4)
    block.eval()(x)
    assert block.block[1].num_batches_tracked == 0
    convolved = block.block[0](x)
    block.train()(x)
    torch.testing.assert_close(block.block[1].running_mean, 0.1 * convolved.mean((0, 2, 3, 4)))
