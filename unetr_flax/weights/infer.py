"""The configuration of a PyTorch checkpoint, from the names and shapes of its arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.errors import CheckpointError
from unetr_flax.weights.families.shapes import Shapes
from unetr_flax.weights.recognize import recognize
from unetr_flax.weights.unwrap import unwrap


def infer_config(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    img_size: Sequence[int] | None = None,
    skip_layers: Sequence[int] | None = None,
    norm_name: str | tuple[str, Mapping[str, Any]] | None = None,
    dropout_rate: float = 0.0,
) -> UNETRConfig:
    """Infers the configuration of a checkpoint from its shapes and what the caller knows beside.

    Args:
      state_dict: arrays or tensors by key, or a checkpoint that holds such a state dict.
      num_heads: attention heads; required, since no shape depends on them.
      img_size: voxels per axis; if None, the tokens must be as many as those of a cube, and are
        taken to be one.
      skip_layers: the four blocks that feed the decoder; by default those that the family's code
        names, 3, 6, 9 and 12, and required of 5 to 11 blocks, as no shape depends on them. MONAI's
        model fixes them.
      norm_name: MONAI's argument of that name; required for group norms and affine instance norms,
        whose arrays look the same.
      dropout_rate: probability of dropping, which matters only in training.

    Returns:
      The configuration, of the family whose signature the keys have.

    Raises:
      CheckpointError: naming what is missing, or what has to be told or cannot be.
      ValueError: if the sizes are not those of a model that can be built.
    """
    state_dict, _ = unwrap(state_dict)
    family = recognize(state_dict)
    if num_heads is None:
        raise CheckpointError(
            "num_heads: shapes do not tell it and it must be given; the default of family "
            f"{family.name!r} is {family.default_num_heads}"
        )
    options = {"skip_layers": skip_layers, "norm_name": norm_name}
    for name, value in options.items():
        if value is not None and name not in family.options:
            raise CheckpointError(
                f"{name}: cannot be given for family {family.name!r}, whose code fixes it"
            )
    return family.config(
        Shapes({key: tuple(value.shape) for key, value in state_dict.items()}),
        num_heads=num_heads,
        img_size=img_size,
        dropout_rate=dropout_rate,
        **{name: options[name] for name in family.options},
    )
