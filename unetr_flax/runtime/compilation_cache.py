"""JAX's cache of compiled programs on disk: where it is, how large, and who can write to it.

Compiling a training step takes XLA far longer than running it, so programs keep the result for
later runs. Compiled programs are code, so a folder that others can write to is refused.
"""

import hashlib
import os
import platform
import stat
from pathlib import Path
from typing import Any

import jax

# Programs that compile faster are not worth a file.
MIN_COMPILE_SECONDS = 0.1
# At the start of a run, the programs used longest ago are removed until this limit holds.
MAX_BYTES = 2 * 2**30


class CompilationCacheError(ValueError):
    """A folder that compiled programs must not be read from; the message says which and why."""


def default_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/unetr_flax/jax`, or the same below `~/.cache`.

    Raises:
      FileNotFoundError: if this user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths are ignored.
    if os.path.isabs(given):
        return Path(given) / "unetr_flax" / "jax"
    try:
        return Path.home() / ".cache" / "unetr_flax" / "jax"
    except RuntimeError:
        raise FileNotFoundError(
            "XDG_CACHE_HOME: must name a folder, as this user has no home folder"
        ) from None


def keep_compiled_programs(folder: str | None = None) -> Path | None:
    """Makes JAX read and write compiled programs in a folder; call it before anything is compiled.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names a folder, which is not checked,
    and JAX_ENABLE_COMPILATION_CACHE=0 switches the cache off.

    Args:
      folder: a folder that is private to this user, made if it does not exist. "" keeps no
        programs; None takes the folder of JAX_COMPILATION_CACHE_DIR or else `default_folder()`.

    Returns:
      The folder, or None if programs are not kept, also because the default folder cannot be made.

    Raises:
      CompilationCacheError: if the folder belongs to another user or others can write to it.
      OSError: if the given folder cannot be made.
    """
    if folder == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if not _option("jax_enable_compilation_cache"):
        return None
    if folder is None and (named := _option("jax_compilation_cache_dir")):
        return Path(named)
    try:
        top = default_folder() if folder is None else Path(folder).absolute()
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        if folder is not None:
            raise
        return None  # a read-only home folder must not stop the program
    _refuse_others(top)
    _make_room(top)
    jax.config.update("jax_compilation_cache_dir", str(top / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # The lowering of cuDNN's attention on several GPUs holds an address of this process.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    return top


def keep_for_accelerators() -> None:
    """Calls `keep_compiled_programs` on GPU and TPU, for commands that run once.

    Compiling takes longest there. On CPU, XLA prints a long and groundless warning about each
    program that it reads (see `train/__init__.py`), which a command cannot silence.
    """
    if jax.default_backend() != "cpu":
        keep_compiled_programs()


def _option(name: str) -> Any:
    """Reads an option of JAX by name: its options are no typed attributes."""
    return getattr(jax.config, name)


def _refuse_others(folder: Path) -> None:
    """Raises CompilationCacheError if another user owns a folder or can write to it."""
    if os.name != "posix":
        return
    found = folder.stat()
    reason = None
    if found.st_uid != os.getuid():
        reason = f"belongs to user {found.st_uid}, not to {os.getuid()} who runs this"
    elif found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        reason = f"others can write to it (mode {mode:o}), chmod 700 keeps them out"
    if reason:
        raise CompilationCacheError(
            f"{folder}: {reason}; compiled programs are code, so their folder must be private. "
            "JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=0 does without"
        )


def _make_room(folder: Path) -> None:
    """Removes the programs used longest ago until the rest fits into MAX_BYTES."""
    # JAX's own limit needs another package. It also writes two files for each program, and once a
    # process was killed between the two, it never keeps anything again.
    used = []
    for path in folder.rglob("*-cache"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run is making room at the same time
            continue
        used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


def _processor() -> str:
    """Returns a name for this kind of processor; CPU programs hold its instructions."""
    # Machines may share a home folder, and JAX's key does not name the processor.
    text = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
