"""glibc's malloc, told to keep the memory that it has: a switch of programs, not of the library.

On CPU every operation's result is fresh memory. Large blocks go back to the kernel when they are
freed, so the next operation has each of their pages made and zeroed again, which for UNETR's
volumes costs as much as computing them.
"""

import ctypes
import platform

import jax

# Constants of glibc's malloc.h.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no block is mapped on its own
    -1: -1,  # M_TRIM_THRESHOLD: a heap's free end is never given back
}


def keep_freed_memory() -> bool:
    """Makes malloc keep freed blocks for later; call it before JAX looks for its devices.

    Memory then hardly ever shrinks below its peak.

    Returns:
      Whether it was possible: with glibc it is, on other systems nothing is done.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Of all heaps only the main thread's takes blocks of any size: JAX has to run programs there.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(libc.mallopt(name, value) == 1 for name, value in _OPTIONS.items())


def return_freed_memory() -> None:
    """Gives what is free back to the kernel, once; after compiling that is a gigabyte."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
