"""PyTorch models that the Flax twins are compared with: the article's UNETR and a sibling."""

from unetr_torch_ref.blocks import (
    Conv3DBlock,
    Deconv3DBlock,
    SingleConv3DBlock,
    SingleDeconv3DBlock,
)
from unetr_torch_ref.encoder import (
    Embeddings,
    FeedForwardBlock,
    MultiHeadAttention,
    PreNorm,
    TransformerBlock,
)
from unetr_torch_ref.summary import Row, Summary, summarize
from unetr_torch_ref.tamasino52 import Tamasino52UNETR
from unetr_torch_ref.unetr import UNETR

__all__ = [
    "UNETR",
    "Conv3DBlock",
    "Deconv3DBlock",
    "Embeddings",
    "FeedForwardBlock",
    "MultiHeadAttention",
    "PreNorm",
    "Row",
    "SingleConv3DBlock",
    "SingleDeconv3DBlock",
    "Summary",
    "Tamasino52UNETR",
    "TransformerBlock",
    "summarize",
]
