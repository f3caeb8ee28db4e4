"""Label maps in files, and commands in this process, for the tests of commands."""

from typing import Any

import numpy as np

from unetr_flax import cli

SPACING = (0.5, 2.0, 3.0)


def box(*sides, value=1):
    """Makes a label map of 8 x 9 x 7 voxels that has the value between (start, stop) per axis."""
    array = np.zeros((8, 9, 7), np.uint8)
    array[tuple(slice(*side) for side in sides)] = value
    return array


LABEL = box((2, 5), (3, 6), (2, 5)) + box((5, 8), (0, 2), (0, 3), value=2)
MISSED = np.where(LABEL == 2, 0, LABEL).astype(np.uint8)


def save(path, array, affine=None, codes="RAS"):
    """Writes voxels along right, anterior and superior to a file whose axes run along others."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.diag([*SPACING, 1.0]) if affine is None else affine)
    transform: Any = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(transform), path)
    return path


def command(monkeypatch, capsys, name):
    """Makes a function that runs `unetr NAME` and gives its status, output and errors."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["unetr", name, *map(str, args)])
        status = cli.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
