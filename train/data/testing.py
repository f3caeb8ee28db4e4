"""Small data sets for the tests, on disk and in memory."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from train.data.preprocess import Sample

SHAPE = (6, 5, 4)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Writes a NIfTI file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def write_metaimage(path: Path, array: np.ndarray) -> Path:
    """Writes the header of a MetaImage file with voxels of 8 bits, which go into `voxels_of` it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ("NDims = 3", f"DimSize = {' '.join(map(str, array.shape))}", "ElementType = MET_UCHAR")
    name = f"ElementDataFile = {voxels_of(path).name}"
    path.write_text("".join(f"{line}\n" for line in (*lines, name)))
    voxels_of(path).write_bytes(array.astype(np.uint8).tobytes(order="F"))
    return path


def voxels_of(path: Path) -> Path:
    """Returns the file that holds the voxels of `write_metaimage`."""
    return path.with_suffix(".raw")


def overwrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the voxels of a NIfTI file."""
    image: Any = nib.load(path)
    write(path, change(np.asarray(image.dataobj).copy()), image.affine)


def write_image(path: Path, seed: int = 0) -> Path:
    """Writes an image of random intensities."""
    return write(path, np.random.default_rng(seed).random(SHAPE).astype(np.float32))


def write_label(path: Path, seed: int = 0, classes: int = 3) -> Path:
    """Writes a label map of random classes."""
    return write(path, np.random.default_rng(seed).integers(0, classes, SHAPE).astype(np.uint8))


def describe(folder: Path, **changes) -> None:
    """Writes dataset.json, or changes fields of the one that is there; None removes a field."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def write_decathlon(folder: Path, cases: int = 3) -> Path:
    """Writes a good data set in Decathlon layout, with the hidden files of real folders."""
    training = []
    for i in range(cases):
        name = f"case_{i}.nii.gz"
        write_image(folder / "imagesTr" / name, i)
        write_label(folder / "labelsTr" / name, i)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    for name in ("imagesTr", "labelsTr"):
        (folder / name / "._case_0.nii.gz").write_bytes(b"macOS")
    describe(
        folder,
        name="Test",
        modality={"0": "MRI"},
        labels={"0": "background", "1": "anterior", "2": "posterior"},
        numTraining=99,
        training=training,
    )
    return folder


def write_boxes(
    folder: Path,
    cases: Iterable[tuple[np.ndarray, np.ndarray]],
    modality: str = "CT",
    affine: np.ndarray | None = None,
) -> Path:
    """Writes images and label maps of boxes as a data set in Decathlon layout.

    Args:
      folder: the folder of the data set.
      cases: image and label map of each case.
      modality: what the images are.
      affine: affine of all files; the identity if None.
    """
    training = []
    for i, (image, label) in enumerate(cases):
        case = {"image": f"imagesTr/box_{i}.nii.gz", "label": f"labelsTr/box_{i}.nii.gz"}
        write(folder / case["image"], image, affine)
        write(folder / case["label"], label, affine)
        training.append(case)
    labels = {"0": "background", "1": "box"}
    describe(folder, name="Boxes", modality={"0": modality}, labels=labels, training=training)
    return folder


def sample(shape: tuple[int, ...], seed: int = 0, name: str = "case") -> Sample:
    """Makes a case whose intensities encode the class and the position of every voxel."""
    label = np.random.default_rng(seed).integers(0, 2, shape).astype(np.int32)
    position = np.arange(label.size, dtype=np.float32).reshape(shape)
    return Sample(
        name,
        np.stack([label + np.float32(1), position + 1], -1).astype(np.float32),
        label,
        (1.0, 1.0, 2.0),
    )
