"""Files that a command writes: checked before the work starts, and written whole or not at all."""

from pathlib import Path

from unetr_flax.runtime.atomic import commit, staged, sync


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses a path that cannot become a file.

    Raises:
      ValueError: if its folder is missing, if it is a folder, or if it is there already and may
        not be replaced.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder is missing")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, must be a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: is there already; --overwrite replaces it")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, or leaves what was there.

    Raises:
      OSError: if it cannot be written.
    """
    with staged(path) as temporary:
        temporary.write_bytes(content)
        sync(temporary)
        commit(temporary, path)
