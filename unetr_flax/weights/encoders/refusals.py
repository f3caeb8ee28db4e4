"""Reasons for which a pretrained encoder cannot be the encoder of a UNETR."""

import re
from collections.abc import Iterable

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.encoders.sources import EncoderSource
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families.shapes import Shapes
from unetr_flax.weights.tables import Table

# What arrays tell that UNETR's blocks do not have, by a pattern of their names.
MECHANISMS = {
    r"(^|\.)(rope|rotary|freqs)": "rotary positions",
    r"(^|\.)(ls\d|gamma_\d|layer_?scale)": "layer scale",
    r"(^|\.)(q_norm|k_norm)": "norms of queries and keys",
    r"(^|\.)rel(ative)?_pos": "relative positions",
    r"(^|\.)(reg(ister)?_tokens?)": "register tokens",
    r"(^|\.)mlp\.(w\d|fc1_g|gate)": "a gated feed-forward layer",
}


def check_mechanisms(source: EncoderSource, keys: Iterable[str], mapped: set[str]) -> None:
    """Checks that the encoder does nothing that UNETR's does not.

    Args:
      source: the project that wrote the file.
      keys: keys without the prefix of a wrapper.
      mapped: keys that have a place in UNETR.

    Raises:
      CheckpointError: naming the mechanism.
    """
    # The pattern of one key of each block, up to what stands below the block.
    block, _, _ = source.block.partition(r"(\d+)\.")
    for key in keys:
        if key in mapped or key.startswith("decoder"):
            continue
        for pattern, mechanism in MECHANISMS.items():
            if re.search(pattern, key):
                raise CheckpointError(f"encoder: has {mechanism} ({key}), UNETR has none")
        below = re.match(rf"{block}\d+\.(.+)", key)
        if below and not below[1].startswith(source.unapplied):
            raise CheckpointError(f"encoder: has {key}, and UNETR's blocks nothing like it")
        below = re.match(rf"{re.escape(source.embedding)}\.(.+)", key)
        if below and below[1] not in source.unapplied:
            raise CheckpointError(f"encoder: has {key}, and UNETR's embedding nothing like it")


def check_sizes(num_layers: int, shapes: Shapes, table: Table, cfg: UNETRConfig) -> None:
    """Checks that depth, widths, patches, biases and activation are those of the model.

    Args:
      num_layers: blocks of the encoder.
      shapes: shapes by key, without the prefix of a wrapper.
      table: names of the encoder's modules.
      cfg: the model's configuration.

    Raises:
      CheckpointError: naming the size, the encoder's and the model's.
    """
    names = {flax_path: name.format(layer=0) for name, flax_path, _ in table.rows}
    patch = shapes[names["encoder/embedding/projection"] + ".weight"]
    expand = shapes[names["encoder/block_{layer}/feed_forward/expand"] + ".weight"]
    sizes: list[tuple[str, object, object]] = [
        ("blocks", num_layers, cfg.num_layers),
        ("width of tokens", patch[0], cfg.hidden_size),
        ("width of the feed-forward layer", expand[0], cfg.mlp_dim),
    ]
    if len(patch) > 2:  # the kernel of a perceptron does not tell the patch's axes
        sizes.append(("patch", patch[2:], cfg.patch_size))
    for name, ours, needed in sizes:
        if ours != needed:
            raise CheckpointError(f"encoder: {name} {ours}, in the model {needed}")
    if names["encoder/block_{layer}/attention/qkv"] + ".bias" in shapes and not cfg.qkv_bias:
        raise CheckpointError(
            "encoder: queries, keys and values have biases, in the model they have none "
            "(qkv_bias=False)"
        )
    if cfg.family_spec.activation != "gelu":
        raise CheckpointError(
            f"encoder: activation gelu, family {cfg.family!r} has {cfg.family_spec.activation}"
        )
