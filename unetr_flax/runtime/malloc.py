"""A switch that makes glibc's malloc keep freed memory instead of returning it to the kernel.

On CPU the result of every operation is newly allocated. By default malloc returns large freed
blocks to the kernel, so for the next operation the kernel makes and zeroes each page again. For
UNETR's volumes that takes as long as computing them.
"""

import ctypes
import platform

import jax

# Constants of glibc's malloc.h.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no block gets a mapping of its own
    -1: -1,  # M_TRIM_THRESHOLD: the free end of a heap is never returned
}


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks for later; call it before JAX looks for its devices.

    The process then hardly ever shrinks below its peak.

    Returns:
      True if malloc is glibc's and took the settings; on other systems nothing is done.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Only the main thread's heap takes blocks of any size, so JAX must run programs in that thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(libc.mallopt(name, value) == 1 for name, value in _OPTIONS.items())


def return_freed_memory() -> None:
    """Returns all free memory to the kernel, once; after compiling that is about a gigabyte."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
