"""Configurations of `monai.networks.nets.UNETR`, by name, that cover each of its options."""

from typing import Any

# Small and non-cubic; each configuration below lists where it differs from this one.
BASE: dict[str, Any] = {
    "in_channels": 2,
    "out_channels": 3,
    "img_size": (32, 16, 48),
    "feature_size": 4,
    "hidden_size": 24,
    "mlp_dim": 40,
    "num_heads": 3,
}
FLAT = {"img_size": (32, 48), "spatial_dims": 2}

DIFFERENCES: dict[str, dict[str, Any]] = {
    # Sizes.
    "base": {},
    "one channel, one class": {"in_channels": 1, "out_channels": 1},
    "many channels and classes": {"in_channels": 7, "out_channels": 14},
    "image as wide as features": {"in_channels": 4},
    "one token": {"img_size": (16, 16, 16), "feature_size": 2},
    "tokens in a row": {"img_size": (16, 16, 64), "feature_size": 2},
    "wide decoder": {"feature_size": 8},
    "decoder of odd width": {"feature_size": 3},
    "narrowest decoder": {"feature_size": 1},
    "wide tokens": {"hidden_size": 48, "num_heads": 4},
    "one head": {"num_heads": 1},
    "heads of one feature": {"num_heads": 24},
    "narrow feed-forward": {"mlp_dim": 5},
    "wide feed-forward": {"mlp_dim": 96},
    # Two dimensions.
    "2D": FLAT,
    "2D, square by one number": {"img_size": 32, "spatial_dims": 2},
    "2D, perceptron, batch norm": {**FLAT, "proj_type": "perceptron", "norm_name": "batch"},
    "2D, bare deconvolutions, basic": {**FLAT, "conv_block": False, "res_block": False},
    "2D, group norm, qkv bias": {
        **FLAT,
        "norm_name": ("group", {"num_groups": 4}),
        "qkv_bias": True,
    },
    # Options of the transformer.
    "perceptron": {"proj_type": "perceptron"},
    "qkv bias": {"qkv_bias": True},
    "dropout": {"dropout_rate": 0.3},
    "perceptron, qkv bias, dropout": {
        "proj_type": "perceptron",
        "qkv_bias": True,
        "dropout_rate": 0.1,
    },
    # Norms of the decoder.
    "instance norm, affine": {"norm_name": ("instance", {"affine": True})},
    "instance norm in capitals": {"norm_name": "INSTANCE"},
    "batch norm": {"norm_name": "batch"},
    "batch norm, not affine": {"norm_name": ("batch", {"affine": False})},
    "group norm": {"norm_name": ("group", {"num_groups": 2})},
    "group norm, not affine": {"norm_name": ("group", {"num_groups": 4, "affine": False})},
    "group norm of one group": {"norm_name": ("group", {"num_groups": 1})},
    # Blocks of the decoder.
    "bare deconvolutions": {"conv_block": False},
    "basic": {"res_block": False},
    "basic, bare deconvolutions": {"conv_block": False, "res_block": False},
    "basic, image as wide as features": {"in_channels": 4, "res_block": False},
    "basic, batch norm": {"res_block": False, "norm_name": "batch"},
    "basic, bare deconvolutions, group norm": {
        "conv_block": False,
        "res_block": False,
        "norm_name": ("group", {"num_groups": 2}),
    },
    "bare deconvolutions, batch norm": {"conv_block": False, "norm_name": "batch"},
    "image as wide as features, batch norm": {"in_channels": 4, "norm_name": "batch"},
    "image as wide as features, instance norm, affine": {
        "in_channels": 4,
        "norm_name": ("instance", {"affine": True}),
    },
}

ALL = {name: {**BASE, **difference} for name, difference in DIFFERENCES.items()}

# A part of the grid that has each kind of value of each option at least once.
COVERING = (
    "base",
    "one channel, one class",
    "decoder of odd width",
    "2D, perceptron, batch norm",
    "2D, bare deconvolutions, basic",
    "2D, group norm, qkv bias",
    "perceptron, qkv bias, dropout",
    "batch norm, not affine",
    "basic, image as wide as features",
    "image as wide as features, instance norm, affine",
)

# The part of COVERING whose gradients are compared in the default tests too.
WITH_GRADIENTS = (
    "base",
    "2D, bare deconvolutions, basic",
    "2D, group norm, qkv bias",
)
