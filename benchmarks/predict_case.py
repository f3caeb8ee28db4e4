"""Scans and a model for the race of whole predictions.

The scans are CT-like phantoms of `train.data.phantoms`. All weights are random but for those of the
last 1 x 1 x 1 convolution, which is fitted to the phantom's spleen: labels of random weights would
be noise, whose resampling says nothing about that of organs.
"""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from train.data.phantoms import make_phantom
from unetr_flax import UNETRConfig
from unetr_flax.imaging.padding import crop_or_pad
from unetr_flax.imaging.presets import PRESETS
from unetr_flax.imaging.volume import Volume
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.weights import from_torch, save_pretrained

PREPROCESSING = PRESETS["spleen"]
SPLEEN = 2  # Class id in the phantom.
SEED = 0
# Half axes of a grown-up's body, in mm.
BODY = (185, 150, 220)
# The slope of the logits; labels do not depend on it.
SHARPNESS = 10.0


@dataclasses.dataclass(frozen=True)
class Scan:
    """The grid of a phantom CT.

    Attributes:
      name: name of its file, without the ending.
      shape: voxels per axis.
      spacing: mm per voxel and axis.
    """

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def __str__(self) -> str:
        return f"{_by(self.shape)} voxels of {_by(self.spacing)} mm"


# A large abdominal CT, as the Decathlon's Task09 has them, and a small one.
LARGE = Scan("large", (512, 512, 168), (0.8, 0.8, 3.0))
SMALL = Scan("small", (127, 127, 126), (1.5, 1.5, 1.5))


@dataclasses.dataclass(frozen=True)
class CaseFolder:
    """The files of the race.

    Attributes:
      path: the folder.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The model as a folder of `save_pretrained`."""
        return self.path / "model"

    @property
    def state_dict(self) -> Path:
        """The model's PyTorch weights, for MONAI's UNETR."""
        return self.path / "model.pt"

    def scan(self, scan: Scan) -> Path:
        """The file of a scan."""
        return self.path / f"{scan.name}.nii.gz"


def config() -> UNETRConfig:
    """Returns the configuration: MONAI's UNETR of 96^3, width 768, with two classes."""
    return UNETRConfig.monai((96, 96, 96), 1, 2)


def make_case(folder: CaseFolder) -> None:
    """Writes the scans, the model's folder and its PyTorch weights."""
    folder.path.mkdir(parents=True, exist_ok=True)
    _write_scan(folder, SMALL)
    image, labels, affine = _write_scan(folder, LARGE)
    torch.manual_seed(SEED)
    model = torch_model_of(config()).eval()
    volume = Volume(image[..., None].astype(np.float32), affine)
    prepared, grid = PREPROCESSING.apply(volume)
    _fit_head(model, prepared, grid.sample_labels(labels) == SPLEEN)
    torch.save(model.state_dict(), folder.state_dict)
    variables = from_torch(model.state_dict(), config())
    save_pretrained(folder.model, config(), variables, preprocessing=PREPROCESSING)


def _write_scan(folder: CaseFolder, scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(SEED)
    image, labels, affine = make_phantom(rng, (scan.shape, scan.spacing), BODY)
    # Most scanners' files run to the left and to the back.
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS")
    )
    file = nib.Nifti1Image(image, affine).as_reoriented(turn)
    file.header.set_xyzt_units("mm")
    nib.save(file, folder.scan(scan))
    return image, labels, affine


def _fit_head(model: torch.nn.Module, image: np.ndarray, inside: np.ndarray) -> None:
    """Fits the last convolution to a structure, by least squares in the window around it."""
    roi = config().img_size
    start = [int(c) - r // 2 for c, r in zip(np.argwhere(inside).mean(0), roi, strict=True)]
    window = np.ascontiguousarray(np.moveaxis(crop_or_pad(image, start, roi), -1, 0))
    target = torch.from_numpy(crop_or_pad(inside, start, roi).astype(np.float32)).flatten() - 0.5
    head = model.out.conv.conv
    seen = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(torch.from_numpy(window)[None])
        hook.remove()
        features = seen[0][0].flatten(1).T
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        fitted = SHARPNESS * torch.linalg.lstsq(features, target[:, None]).solution[:, 0]
        head.weight[...] = torch.stack([-fitted[:-1], fitted[:-1]]).reshape(head.weight.shape)
        head.bias[...] = torch.stack([-fitted[-1], fitted[-1]])


def _by(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
