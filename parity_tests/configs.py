"""Configurations for the ladder: small and non-cubic, with patches of several sizes."""

from unetr_flax import UNETRConfig

# Two patch axes are equal, so that a planted exchange of kernel axes passes every check of shapes.
SMALL = UNETRConfig.reference(
    img_size=(16, 24, 16),
    in_channels=4,
    out_channels=3,
    light_r=16,
    patch_size=(8, 8, 4),
    hidden_size=24,
    num_layers=5,
    num_heads=3,
)

# The article's patch size, one channel, and other ratios of sizes than SMALL has.
PATCH_16 = UNETRConfig.reference(
    img_size=(16, 32, 16),
    in_channels=1,
    out_channels=2,
    light_r=8,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    mlp_dim=40,
)

# The remaining patch sizes, and skip layers that are not evenly spaced.
PATCH_1_2_4 = UNETRConfig.reference(
    img_size=(2, 8, 12),
    in_channels=1,
    out_channels=2,
    light_r=16,
    patch_size=(1, 2, 4),
    hidden_size=12,
    num_layers=6,
    num_heads=2,
    skip_layers=(1, 2, 5, 6),
)

# The family of github.com/tamasino52/UNETR, with patches that differ by axis.
TAMASINO52 = UNETRConfig.tamasino52(
    (16, 12, 4),
    1,
    5,
    patch_size=(8, 4, 2),
    hidden_size=12,
    num_layers=5,
    num_heads=4,
    mlp_dim=7,
    skip_layers=(1, 2, 4, 5),
    width=6,
)

# Those of the reference.
ALL = {"small": SMALL, "patch 16": PATCH_16, "patch 1, 2 and 4": PATCH_1_2_4}
