"""How much memory this process can still get, whether it ran out, and sizes in words."""

import contextlib
import errno
import os
from pathlib import Path

# The limit of a container, what it uses, and its statistics: cgroup version 2, and version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 62
_FILES = (errno.EMFILE, errno.ENFILE)
_DISK = (errno.ENOSPC, errno.EDQUOT)


def available_memory() -> int:
    """Returns the bytes of memory that this process can still get.

    The smallest of what the machine has left, the container's limit (cgroup) and the process's own
    (`ulimit -v`); practically without limit where none of these is known.
    """
    return min(_machine(), _container(), _process())


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out: Python's or a device's."""
    if isinstance(error, MemoryError):
        return True
    # Tensorstore has the same name for whatever else runs out.
    return "RESOURCE_EXHAUSTED" in str(error) and not _says(error, (*_FILES, *_DISK))


def is_out_of_files(error: BaseException) -> bool:
    """Returns whether an error says that too many files are open: Python's or a library's."""
    return getattr(error, "errno", None) in _FILES or _says(error, _FILES)


def _says(error: BaseException, codes: tuple[int, ...]) -> bool:
    """Returns whether a message holds what the system says of one of some errors."""
    return any(os.strerror(code) in str(error) for code in codes)


def show_bytes(count: float) -> str:
    """Writes a number of bytes in a unit that people read, such as 1.3 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":  # the rest would round to 1000
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def _machine() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _UNKNOWN


def _container() -> int:
    for names in _CGROUP_FILES:
        # "max" stands for no limit.
        with contextlib.suppress(OSError, ValueError):
            limit, usage, statistics = ((_CGROUP / name).read_text() for name in names)
            left = int(limit) - int(usage)
            for line in statistics.splitlines():
                # Pages of files, which the kernel gives up for anything else.
                if line.startswith("inactive_file "):
                    left += int(line.split()[1])
            return max(0, left)
    return _UNKNOWN


def _process() -> int:
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return _UNKNOWN
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return _UNKNOWN
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return limit
