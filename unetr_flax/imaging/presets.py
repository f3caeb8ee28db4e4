"""Preprocessing of well-known tasks by name, for checkpoints that say nothing of theirs."""

import json
from pathlib import Path

from unetr_flax.imaging.intensity import Window
from unetr_flax.imaging.preprocessing import Preprocessing

# The labels of "Beyond the Cranial Vault" (Synapse syn3193805), in the order of its ids.
_BTCV_LABELS = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal vein and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)

PRESETS = {
    # UNETR's code and MONAI's tutorial for BTCV: Hatamizadeh et al. 2022, section 4.2.
    "btcv": Preprocessing(
        ("CT",),
        (Window(-175, 250),),
        labels=_BTCV_LABELS,
        spacing=(1.5, 1.5, 2.0),
        crop_foreground=True,
    ),
    # MONAI's tutorial for the Decathlon's Task09.
    "spleen": Preprocessing(
        ("CT",),
        (Window(-57, 164),),
        labels=("background", "spleen"),
        spacing=(1.5, 1.5, 2.0),
        crop_foreground=True,
    ),
    # What training takes for the Decathlon's Task04.
    "hippocampus": Preprocessing.from_modalities(
        ["MRI"], labels=["background", "Anterior", "Posterior"]
    ),
}


def find_preprocessing(name: str) -> Preprocessing:
    """Returns a preset, or reads a JSON file of `Preprocessing.to_dict`.

    The JSON may also be a file that holds it as "preprocessing", such as a model folder's
    config.json.

    Args:
      name: name of a preset, or path of a file.

    Raises:
      ValueError: if it is neither; the message is one line.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name}: must be one of {', '.join(PRESETS)}, or a JSON file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "preprocessing" in values:
            values = values["preprocessing"]
        return Preprocessing.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: preprocessing: {error}") from None
