"""Generated CT-like phantoms with several organs, as a data set in Decathlon layout."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

LABELS = ("background", "liver", "spleen", "kidneys")

# Hounsfield units of a contrast-enhanced scan. The intensities of liver and spleen overlap, and
# vessels are as bright as kidneys, so a model has to tell them apart by their positions.
AIR, FAT, MUSCLE, BOWEL, VESSEL, BONE = -1000, -100, 55, 40, 165, 400
ORGAN_HU = {1: 105, 2: 115, 3: 170}

# Half axes of the average body in mm.
BODY = (135, 110, 105)

# Class, center and half axes of each organ, in units of the body's half axes; x points to the
# patient's right, y to the front, z to the head.
ORGANS = (
    (3, (-0.36, -0.36, -0.25), (0.19, 0.25, 0.40)),
    (3, (0.36, -0.36, -0.32), (0.19, 0.25, 0.40)),
    (1, (0.42, 0.14, 0.25), (0.38, 0.52, 0.55)),
    (2, (-0.54, -0.12, 0.35), (0.23, 0.36, 0.42)),
)


def make_phantoms(folder: Path, num_cases: int, seed: int) -> None:
    """Writes a data set of phantoms: dataset.json, imagesTr, labelsTr.

    The folder appears complete or not at all. Cases differ in size, spacing, pose, intensities and
    orientation of the file; the same seed gives the same data.

    Args:
      folder: the folder to make; must not exist.
      num_cases: number of cases.
      seed: seed of all random numbers.

    Raises:
      FileExistsError: if the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        complete = Path(temporary) / "dataset"
        _write_dataset(complete, num_cases, seed)
        complete.rename(folder)


def make_phantom(
    rng: np.random.Generator,
    grid: tuple[Sequence[int], Sequence[float]] | None = None,
    body: Sequence[float] = BODY,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes one phantom on the canonical grid.

    Args:
      rng: source of all random numbers.
      grid: voxels per axis, and mm per voxel and axis; small and random if None.
      body: half axes of the average body in mm.

    Returns:
      Hounsfield units [X, Y, Z], int16; class ids [X, Y, Z], uint8; and the affine, 4 x 4.
    """
    if grid is None:
        shape = rng.integers((44, 37, 18), (49, 41, 25))
        spacing = np.array([*[rng.uniform(6.0, 6.6)] * 2, rng.uniform(8.5, 10.0)])
    else:
        shape, spacing = map(np.array, grid)
    half_axes = rng.uniform(0.92, 1.08, 3) * body
    axes = [
        (np.arange(n) - (n - 1) / 2) * mm / half
        for n, mm, half in zip(shape, spacing, half_axes, strict=True)
    ]
    shift = rng.uniform(-0.08, 0.08, 3)
    # Arrays of axes that broadcast take less memory than those of all voxels.
    x, y, z = np.ix_(*(axis - s for axis, s in zip(axes, shift, strict=True)))
    tilt = rng.uniform(-0.12, 0.12)
    x, y = np.cos(tilt) * x - np.sin(tilt) * y, np.sin(tilt) * x + np.cos(tilt) * y

    radius = np.hypot(x, y)
    image = np.full(shape, AIR, np.float32)
    image[radius[..., 0] < 1] = FAT
    image[radius[..., 0] < 0.93] = MUSCLE + rng.normal(0, 5)
    image[radius[..., 0] < 0.80] = FAT
    for _ in range(12):
        center = rng.uniform((-0.6, -0.1, -0.9), (0.5, 0.6, 0.6))
        image[_ellipsoid(x, y, z, center, rng.uniform(0.08, 0.2, 3))] = BOWEL + rng.normal(0, 15)
    vessel = np.hypot(x + 0.08, y + 0.30)[..., 0] < 0.09
    image[vessel] = VESSEL + rng.normal(0, 10)
    label = np.zeros(shape, np.uint8)
    for class_id, center, half_axes in ORGANS:
        center = center + rng.normal(0, 0.03, 3)
        half_axes = half_axes * rng.uniform(0.88, 1.12, 3)
        inside = _ellipsoid(x, y, z, center, half_axes) & (radius < 0.80) & (label == 0)
        label[inside] = class_id
        image[inside] = ORGAN_HU[class_id] + rng.normal(0, 6)
    spine = np.hypot(x, y + 0.62)[..., 0] < 0.16
    label[spine] = 0
    image[spine] = BONE + rng.normal(0, 40)
    # The filter stands for the partial-volume effect at edges, the noise for the scanner's.
    image = ndimage.gaussian_filter(image, 0.5)
    image += rng.normal(0, rng.uniform(10, 18), shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (shape - 1) / 2
    return np.clip(image, -1024, 3071).astype(np.int16), label, affine


def _ellipsoid(x, y, z, center, half_axes) -> np.ndarray:
    """Marks the voxels inside an ellipsoid."""
    scaled = ((p - c) / a for p, c, a in zip((x, y, z), center, half_axes, strict=True))
    radius_squared: Any = sum(p**2 for p in scaled)
    return radius_squared < 1


def _write_dataset(folder: Path, num_cases: int, seed: int) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    cases = []
    for i in range(num_cases):
        rng = np.random.default_rng((seed, i))
        image, label, affine = make_phantom(rng)
        # Files of real scanners have several orientations, so those of phantoms have, too.
        codes = "RAS" if i % 3 == 0 else ("LPS" if i % 3 == 1 else "LAS")
        for kind, array in (("imagesTr", image), ("labelsTr", label)):
            file = nib.Nifti1Image(array, affine)
            turn: Any = nib.orientations.ornt_transform(
                nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
            )
            nib.save(file.as_reoriented(turn), folder / kind / f"phantom_{i:03d}.nii.gz")
        name = f"phantom_{i:03d}.nii.gz"
        cases.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {
        "name": "Phantoms",
        "description": "Generated CT-like phantoms; no patient's data",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(i): name for i, name in enumerate(LABELS)},
        "numTraining": num_cases,
        "numTest": 0,
        "training": cases,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))
