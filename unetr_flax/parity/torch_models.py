"""The PyTorch original of a configuration, and its weights."""

import fractions
from collections.abc import Mapping
from typing import Any

import torch

import unetr_torch_ref
from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.convert import drop_unused
from unetr_flax.weights.torch_files import to_tensor
from unetr_flax.weights.unused_keys import COUNTER, known_unused
from unetr_flax.weights.unwrap import unwrap


class TorchModelError(ValueError):
    """An original that is not installed, or that does not take the weights."""


def torch_model_of(cfg: UNETRConfig) -> torch.nn.Module:
    """A fresh PyTorch model of a configuration, image [B, C, *img_size] -> [B, K, *img_size].

    Args:
      cfg: the configuration; MONAI's family needs the package monai, 1.3 or later.

    Raises:
      TorchModelError: if monai is needed and not installed.
    """
    makers = {"reference": _reference, "monai": _monai, "tamasino52": _tamasino52}
    return makers[cfg.family](cfg)


def load_weights(
    model: torch.nn.Module, state_dict: Mapping[str, Any], cfg: UNETRConfig
) -> torch.nn.Module:
    """Gives a model the weights of a state dict, in the model's dtype, and returns it.

    Args:
      model: that of `torch_model_of`.
      state_dict: tensors or arrays, as for `from_torch`: of any version, with wrappers' prefixes.
      cfg: the configuration.

    Raises:
      TorchModelError: if the model has a weight that it applies and that the state dict has not, or
        the other way round, or of another shape.
    """
    given, _ = drop_unused(unwrap(state_dict)[0], cfg)
    tensors = {key: to_tensor(value) for key, value in given.items()}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise TorchModelError(f"state dict: {' '.join(str(error).split())}") from None
    idle = known_unused(cfg)
    missing = [key for key in missing if key not in idle and key.rpartition(".")[2] != COUNTER]
    if missing or unexpected:
        raise TorchModelError(
            f"state dict: {type(model).__name__} misses {missing} and does not know {unexpected}"
        )
    return model


def _reference(cfg: UNETRConfig) -> torch.nn.Module:
    return unetr_torch_ref.UNETR(
        **_common(cfg),
        # The exact divisor: a float could truncate to a width one below.
        light_r=fractions.Fraction(64, cfg.channels[0]),
    )


def _tamasino52(cfg: UNETRConfig) -> torch.nn.Module:
    return unetr_torch_ref.Tamasino52UNETR(**_common(cfg), channels=cfg.channels[0])


def _common(cfg: UNETRConfig) -> dict[str, Any]:
    return {
        "img_shape": cfg.img_size,
        "input_dim": cfg.in_channels,
        "output_dim": cfg.out_channels,
        "embed_dim": cfg.hidden_size,
        "patch_size": cfg.patch_size,
        "num_heads": cfg.num_heads,
        "dropout": cfg.dropout_rate,
        "num_layers": cfg.num_layers,
        "mlp_dim": cfg.mlp_dim,
        "ext_layers": cfg.skip_layers,
    }


def _monai(cfg: UNETRConfig) -> torch.nn.Module:
    try:
        from monai.networks.nets.unetr import UNETR
    except ModuleNotFoundError as error:
        raise TorchModelError(
            f"{error.name}: not installed, and the original of family 'monai' is in it: "
            "pip install monai"
        ) from None
    options: dict[str, Any] = {"affine": cfg.norm_affine}
    if cfg.norm == "group":
        options["num_groups"] = cfg.norm_groups
    return UNETR(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        img_size=cfg.img_size,
        feature_size=cfg.channels[0],
        hidden_size=cfg.hidden_size,
        mlp_dim=cfg.mlp_dim,
        num_heads=cfg.num_heads,
        proj_type=cfg.proj_type,
        norm_name=(cfg.norm, options),
        conv_block=cfg.skip_convs,
        res_block=cfg.block == "residual",
        dropout_rate=cfg.dropout_rate,
        spatial_dims=cfg.spatial_rank,
        qkv_bias=cfg.qkv_bias,
    )
