"""The files on disk that a path of a data set stands for."""

from pathlib import Path

from unetr_flax.imaging.scan import SCAN_ENDINGS, open_image_file


def stored_files(path: Path) -> list[Path]:
    """Lists the files that an image or a label map is read from.

    Args:
      path: a file, which counts with the one beside it that holds its voxels, if its header names
        one; or a folder, as of a DICOM series, which counts as all files in it.

    Raises:
      VolumeError: if a header cannot be read.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    # Single slices of DICOM have other names.
    if not path.name.lower().endswith(SCAN_ENDINGS):
        return [path]
    voxels = open_image_file(path).voxels.path
    return [path] if voxels == path else [path, voxels]
