"""The cases in a file or a tree of folders: plain files, files per channel, DICOM series."""

import dataclasses
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from unetr_flax.imaging.dicom_series import group_by_series
from unetr_flax.imaging.dicom_slice import SeriesFile, is_dicom
from unetr_flax.imaging.regular_file import reason
from unetr_flax.imaging.scan import SCAN_ENDINGS
from unetr_flax.imaging.volume import VolumeError

_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CaseFiles:
    """The files of one scan.

    Attributes:
      name: path relative to the folder that was searched, without ending; no other case has it.
      images: what `read_scan` takes: one file, a file per channel, or the slices of a series.
    """

    name: str
    images: tuple[Path, ...]


def find_cases(source: Path, channels: int, *, except_below: Path | None = None) -> list[CaseFiles]:
    """Finds the cases of a file or a folder, in the order of their names.

    A folder is searched with all below it, links to folders included, each only once; names that
    start with a dot are passed over. In a folder with files `{case}_0000.nii.gz` the four digits
    count the channels of a case; all other names are those of cases. The DICOM slices of a folder
    are one case per series.

    Args:
      source: a file, or a folder.
      channels: channels that a case has.
      except_below: a folder that is not searched: where results are written, which are no scans.

    Raises:
      VolumeError: if `source` is not there, if there is no case, if a folder cannot be read, if
        channels of a case are missing or too many, or if two cases have the same name. Damaged
        files are not looked into; `read_scan` tells.
    """
    source = Path(source)
    if not os.path.lexists(source):
        raise VolumeError(f"{source}: no such file or folder")
    if not source.is_dir():
        ending = _ending(source)
        name = source.name[: len(source.name) - len(ending)] if ending else source.stem
        return [CaseFiles(name, (source,))]
    cases: dict[str, CaseFiles] = {}
    for folder, names in _folders(source, except_below):
        for case in _cases_of_folder(source, folder, names, channels):
            if case.name in cases:
                paths = (cases[case.name].images[0], case.images[0])
                raise VolumeError(f"{paths[0]} and {paths[1]}: two cases with the name {case.name}")
            cases[case.name] = case
    if not cases:
        raise VolumeError(
            f"{source}: no scans in this folder or below; looked for DICOM slices and names that "
            f"end in {', '.join(SCAN_ENDINGS)}"
        )
    return [cases[name] for name in sorted(cases)]


def _folders(source: Path, excluded: Path | None) -> Iterator[tuple[Path, list[str]]]:
    """Yields a folder and those below it, each once, with the names of what is no folder in it."""
    pending, seen = [source], set()
    if excluded is not None and excluded.is_dir() and not excluded.samefile(source):
        status = excluded.stat()
        seen.add((status.st_dev, status.st_ino))
    while pending:
        folder = pending.pop()
        files, folders = [], []
        try:
            status = os.stat(folder)
            entries = sorted(os.listdir(folder))
        except OSError as error:
            raise VolumeError(f"{folder}: cannot be read ({reason(error)})") from None
        # Links can lead back to a folder above.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in entries:
            if not name.startswith("."):
                (folders if (folder / name).is_dir() else files).append(name)
        yield folder, files
        pending += [folder / name for name in reversed(folders)]


def _cases_of_folder(
    source: Path, folder: Path, names: list[str], channels: int
) -> Iterator[CaseFiles]:
    stems = {name: name[: -len(_ending(Path(name)))] for name in names if _ending(Path(name))}
    numbers = {name: found for name in stems if (found := _CHANNEL.fullmatch(stems[name]))}
    # Without a number of a channel of the model the digits are part of plain names.
    if not any(int(found[2]) < channels for found in numbers.values()):
        numbers = {}
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for name in stems:
        if name not in numbers:
            yield CaseFiles(_relative(source, folder / stems[name]), (folder / name,))
            continue
        case, number = numbers[name][1], int(numbers[name][2])
        if number in groups[case]:
            raise VolumeError(f"{folder / name} and {groups[case][number]}: the same channel twice")
        groups[case][number] = folder / name
    for case, files in groups.items():
        _check_channels(folder / case, files, channels)
        yield CaseFiles(_relative(source, folder / case), tuple(files[i] for i in range(channels)))
    others = [folder / name for name in names if name not in stems]
    yield from _dicom_cases(source, folder, [path for path in others if _may_be_slice(path)])


def _check_channels(case: Path, files: dict[int, Path], channels: int) -> None:
    if missing := [f"_{i:04d}" for i in range(channels) if i not in files]:
        raise VolumeError(
            f"{case}: channel {', '.join(missing)} is missing, must be _0000 to _{channels - 1:04d}"
        )
    if excess := [path.name for i, path in sorted(files.items()) if i >= channels]:
        raise VolumeError(f"{case}: {channels} channels are wanted, there is also {excess[0]}")


def _may_be_slice(path: Path) -> bool:
    # What is neither a scan by its name nor a file is no case.
    if not path.is_file():
        return False
    try:
        return is_dicom(path)
    except VolumeError:
        # Reading the case will tell, where a slice would otherwise be lost.
        return True


def _dicom_cases(source: Path, folder: Path, paths: list[Path]) -> Iterator[CaseFiles]:
    try:
        found = group_by_series(paths) if paths else []
    except VolumeError:
        # Reading this case will tell what is wrong with it; others can still be read.
        yield CaseFiles(_relative(source, folder), tuple(paths))
        return
    for files in found:
        name = _relative(source, folder)
        if len(found) > 1:
            name = f"{name}/{_series_name(files[0], found)}"
        yield CaseFiles(name, tuple(sorted(file.path for file in files)))


def _series_name(file: SeriesFile, found: list[list[SeriesFile]]) -> str:
    """Names a series by its number, and by a digest of its UID where others have the number."""
    name = f"series_{file.number:03d}"
    if sum(files[0].number == file.number for files in found) == 1:
        return name
    return f"{name}_{hashlib.sha256(file.series.encode(errors='replace')).hexdigest()[:8]}"


def _relative(source: Path, path: Path) -> str:
    return path.relative_to(source).as_posix() if path != source else source.resolve().name


def _ending(path: Path) -> str:
    """Returns the ending of a scan's name, the longest that fits; empty if there is none."""
    name = path.name.lower()
    return max((end for end in SCAN_ENDINGS if name.endswith(end)), key=len, default="")
