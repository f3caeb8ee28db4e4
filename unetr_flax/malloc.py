"""glibc's malloc, told to keep the memory that it has: a switch of programs, not of the library.

On CPU every operation's result is fresh memory. Large blocks go back to the kernel when they are
freed, so the next operation has each of their pages made and zeroed again, which for UNETR's
volumes costs as much as computing them.
"""

import ctypes
import platform

# Constants of glibc's malloc.h, and the values that keep blocks of any size in one heap. Of a
# second heap, blocks of up to 64 MB would not be kept; but with one, compiling takes half as
# long again.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no block is mapped on its own
    -1: -1,  # M_TRIM_THRESHOLD: the heap's free end is never given back
    -8: 1,  # M_ARENA_MAX: all threads share one heap
}


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks for later; call it before large arrays are made.

    Memory then never shrinks below its peak.

    Returns:
      Whether it was possible: with glibc it is, on other systems nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) == 1 for name, value in _OPTIONS.items())
