"""The values of string fields in configurations."""

from typing import Literal

# How PyTorch keeps the patch embedding: as the kernel of a convolution or of a linear map.
Projection = Literal["conv", "perceptron"]
# How a convolution block of the decoder is built, see `BlockStyle`.
Block = Literal["conv", "basic", "residual"]
Norm = Literal["batch", "instance", "group"]
# Of the transformer's feed-forward layers; "gelu" is the exact one.
Activation = Literal["gelu", "relu"]
Sublayer = Literal["attention", "feed_forward"]
