"""Convolution blocks of the decoder (Hatamizadeh et al. 2022, figure 2: the colored arrows).

All tensors are channels first: [B, C, H, W, D].
"""

from torch import Tensor, nn


class SingleDeconv3DBlock(nn.Module):
    """A transposed convolution whose kernel size is its stride, so that its windows do not overlap.

    [B, in_planes, H, W, D] -> [B, out_planes, H*stride, W*stride, D*stride]. The stride is one
    number or one per axis; an axis with stride 1 keeps its size.
    """

    def __init__(self, in_planes: int, out_planes: int, stride: int | tuple[int, int, int] = 2):
        super().__init__()
        self.block = nn.ConvTranspose3d(
            in_planes, out_planes, kernel_size=stride, stride=stride, padding=0, output_padding=0
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class SingleConv3DBlock(nn.Module):
    """A convolution that keeps the size: [B, in_planes, H, W, D] -> [B, out_planes, H, W, D].

    The kernel size must be odd.
    """

    def __init__(self, in_planes: int, out_planes: int, kernel_size: int):
        super().__init__()
        self.block = nn.Conv3d(
            in_planes, out_planes, kernel_size, stride=1, padding=(kernel_size - 1) // 2
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Conv3DBlock(nn.Module):
    """Convolution, batch norm, ReLU: [B, in_planes, H, W, D] -> [B, out_planes, H, W, D]."""

    def __init__(self, in_planes: int, out_planes: int, kernel_size: int = 3):
        super().__init__()
        self.block = nn.Sequential(
            SingleConv3DBlock(in_planes, out_planes, kernel_size),
            nn.BatchNorm3d(out_planes),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Deconv3DBlock(nn.Module):
    """Transposed convolution, convolution, batch norm, ReLU.

    [B, in_planes, H, W, D] -> [B, out_planes, H*stride, W*stride, D*stride].
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_size: int = 3,
        *,
        stride: int | tuple[int, int, int] = 2,
    ):
        super().__init__()
        self.block = nn.Sequential(
            SingleDeconv3DBlock(in_planes, out_planes, stride),
            SingleConv3DBlock(out_planes, out_planes, kernel_size),
            nn.BatchNorm3d(out_planes),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
