"""Compiled programs kept on disk between runs: a choice of programs, not of the library.

XLA takes far longer to compile a training step than to take one. JAX can keep what was compiled;
here it is told where, how much, and to trust no folder that others can write to, as compiled
programs are code.
"""

import hashlib
import os
import platform
import stat
from pathlib import Path

import jax

# What took less to compile is not worth a file.
MIN_COMPILE_SECONDS = 0.1
# Programs that were used longest ago make room at the start of a run.
MAX_BYTES = 2 * 2**30


class CompilationCacheError(ValueError):
    """A folder that compiled programs must not be read from; the message names it and says why."""


def default_folder() -> Path:
    """Where compiled programs are kept: `$XDG_CACHE_HOME/unetr_flax/jax` or below `~/.cache`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    cache = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return cache / "unetr_flax" / "jax"


def keep_compiled_programs(folder: str | None = None) -> Path | None:
    """Has JAX read and write compiled programs in a folder; call it before anything is compiled.

    What JAX was told by its own means holds: JAX_COMPILATION_CACHE_DIR names a folder (that is not
    checked), JAX_ENABLE_COMPILATION_CACHE=0 switches all of this off.

    Args:
      folder: private to this user, made if it does not exist; none at all if ""; if None, that of
        JAX_COMPILATION_CACHE_DIR or `default_folder()`.

    Returns:
      The folder; None if programs are not kept, be it that the default one cannot be made.

    Raises:
      CompilationCacheError: if the folder belongs to another user or others can write to it.
      OSError: if the given folder cannot be made.
    """
    if folder == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if not jax.config.jax_enable_compilation_cache:
        return None
    if folder is None and jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    top = default_folder() if folder is None else Path(folder).absolute()
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        if folder is not None:
            raise
        return None  # a home that is read-only is no reason to compute nothing
    _refuse_others(top)
    _make_room(top)
    jax.config.update("jax_compilation_cache_dir", str(top / _processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # cuDNN's attention, on several GPUs, is lowered with an address of this very process.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    return top


def keep_for_accelerators() -> None:
    """`keep_compiled_programs` for commands that run once, on GPU and TPU.

    There compiling takes longest; on CPU, XLA warns loudly of each program that is read, without
    a reason (see `train/__init__.py`), and a command cannot silence it.
    """
    if jax.default_backend() != "cpu":
        keep_compiled_programs()


def _refuse_others(folder: Path) -> None:
    """Raises if anybody else can put something into a folder."""
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
    """Removes the programs that were used longest ago until the others are within MAX_BYTES."""
    # JAX's own limit needs a package that it does not bring, and stops keeping anything for good
    # once a program is killed between the two files that it then writes of each.
    used = []
    for path in folder.rglob("*-cache"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another run makes room too
            continue
        used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


def _processor() -> str:
    """A name for this machine's kind of processor, whose instructions CPU programs are made of."""
    # Homes are shared by machines, and JAX's key does not say which of them compiled a program.
    text = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
