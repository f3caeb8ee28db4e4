"""The values of string fields in configurations."""

from typing import Literal

# PyTorch's form of the patch embedding: the kernel of a convolution or of a linear map.
Projection = Literal["conv", "perceptron"]
# The kinds of the decoder's convolution blocks, see `BlockStyle`.
Block = Literal["conv", "basic", "residual"]
Norm = Literal["batch", "instance", "group"]
# Activations of the transformer's feed-forward layers; "gelu" is the exact (erf) one.
Activation = Literal["gelu", "relu"]
Sublayer = Literal["attention", "feed_forward"]
