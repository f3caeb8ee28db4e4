"""Pretrained 3D vision transformers of other projects, as encoders of a UNETR."""

from unetr_flax.weights.encoders.transfer import Transfer, load_encoder

__all__ = ["Transfer", "load_encoder"]
