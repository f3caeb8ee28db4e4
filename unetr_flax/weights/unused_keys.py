"""Keys that versions of the PyTorch models write, but never apply.

MONAI's blocks have carried class tokens, shortcuts of residual blocks that need none, and
cross-attention that UNETR never calls, each in some versions only.
"""

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.families.monai import same_width_blocks

# MONAI's versions between which the never-applied keys changed: the first version of each kind.
MONAI_VERSIONS = ("0.7", "0.9", "1.4", "1.6")

# PyTorch counts batches for an option that UNETR does not use.
COUNTER = "num_batches_tracked"


def unused_keys(cfg: UNETRConfig, version: str | None = None) -> dict[str, np.ndarray]:
    """What a version's state dict has beside the weights that count, as identities.

    Args:
      cfg: the model's configuration.
      version: for MONAI, its version, such as "1.5"; the latest if None. Other families have one.

    Returns:
      float32 arrays by key: ones for scales, zeros for shifts, identity matrices for maps.

    Raises:
      ValueError: if the version is not one, or given for another family.
    """
    if cfg.family != "monai":
        if version is not None:
            raise ValueError(f"version {version}: family {cfg.family!r} has no versions")
        width = cfg.hidden_size
        return _affine("transformer.encoder_norm", width) if cfg.family == "tamasino52" else {}
    major, minor = _parse(version or MONAI_VERSIONS[-1])
    keys = {}
    if (major, minor) < (0, 9):
        keys["vit.patch_embedding.cls_token"] = np.zeros((1, 1, cfg.hidden_size), np.float32)
        if cfg.block == "residual":
            keys |= _idle_shortcuts(cfg)
    if (major, minor) >= (1, 4):
        for layer in range(cfg.num_layers):
            block = f"vit.blocks.{layer}"
            keys |= _affine(f"{block}.norm_cross_attn", cfg.hidden_size)
            if (major, minor) < (1, 6):
                keys |= _cross_attention(f"{block}.cross_attn", cfg)
    return keys


def known_unused(cfg: UNETRConfig) -> set[str]:
    """Every key that some version of the family writes and none applies."""
    versions = MONAI_VERSIONS if cfg.family == "monai" else (None,)
    return {key for version in versions for key in unused_keys(cfg, version)}


def _parse(version: str) -> tuple[int, int]:
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise ValueError(f"version {version!r}: must be a MONAI version, such as 1.6") from None
    if (major, minor) < (0, 7):
        raise ValueError(f"version {version}: must be 0.7 or later; UNETR has other keys before")
    return major, minor


def _affine(name: str, width: int) -> dict[str, np.ndarray]:
    return {
        f"{name}.weight": np.ones(width, np.float32),
        f"{name}.bias": np.zeros(width, np.float32),
    }


def _cross_attention(name: str, cfg: UNETRConfig) -> dict[str, np.ndarray]:
    width = cfg.hidden_size
    keys = {}
    for linear in ("out_proj", "to_q", "to_k", "to_v"):
        keys[f"{name}.{linear}.weight"] = np.eye(width, dtype=np.float32)
        if linear == "out_proj" or cfg.qkv_bias:
            keys[f"{name}.{linear}.bias"] = np.zeros(width, np.float32)
    return keys


def _idle_shortcuts(cfg: UNETRConfig) -> dict[str, np.ndarray]:
    keys = {}
    for block, width in same_width_blocks(cfg):
        kernel = np.eye(width, dtype=np.float32).reshape(width, width, *(1,) * cfg.spatial_rank)
        keys[f"{block}.conv3.conv.weight"] = kernel
        norm = f"{block}.norm3"
        if cfg.norm_affine:
            keys |= _affine(norm, width)
        if cfg.norm == "batch":
            keys[f"{norm}.running_mean"] = np.zeros(width, np.float32)
            keys[f"{norm}.running_var"] = np.ones(width, np.float32)
            keys[f"{norm}.{COUNTER}"] = np.zeros((), np.int64)
    return keys
