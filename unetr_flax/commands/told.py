"""The options of commands that tell what the shapes in a PyTorch file do not."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Told:
    """Facts about the model in a PyTorch file that its shapes do not tell."""

    num_heads: int | None = None
    """Attention heads; required."""

    img_size: tuple[int, ...] | None = None
    """Voxels per axis of the model's window; required unless it is a cube."""

    skip_layers: tuple[int, int, int, int] | None = None
    """Transformer blocks that feed the decoder; those of the family's code, 3 6 9 12, if not given;
    required if there are 5 to 11."""

    norm: Literal["group", "instance"] | None = None
    """MONAI's norm_name, if it is a group norm or an affine instance norm."""

    norm_groups: int | None = None
    """Channel groups of a group norm."""

    dropout_rate: float = 0.0
    """Probability of dropping, for training on."""

    ignore: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Pattern of keys beside the model's to drop, such as 'loss.*'; can be given several times."""

    def keywords(self) -> dict[str, Any]:
        """Returns the arguments of `infer_config`.

        Raises:
          CheckpointError: if a group norm is told without its groups, or groups without it.
        """
        values = vars(self).copy()
        del values["ignore"]
        norm, groups = values.pop("norm"), values.pop("norm_groups")
        if (norm == "group") != (groups is not None):
            from unetr_flax.weights.errors import CheckpointError

            raise CheckpointError("--norm group and --norm-groups: give both or neither")
        options = {"num_groups": groups} if norm == "group" else {"affine": True}
        return {**values, "norm_name": None if norm is None else (norm, options)}
