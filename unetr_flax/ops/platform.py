"""The choice of a lowering: by the caller, and by the platform that a program runs on."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax import lax

# "auto" lowers an operation to the fastest form for each platform, "xla" to the plain definition
# in XLA's own operations on every platform.
Lowering = Literal["auto", "xla"]

_TARGET = jax.make_user_context()
_EXPORTABLE = jax.make_user_context(False)

# "gpu" stands for several of XLA's platforms, so all branches stay for it.
_SINGLE_PLATFORMS = ("cpu", "tpu")


def by_platform(*operands: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """Calls the branch of the platform that the program runs on, as `jax.lax.platform_dependent`.

    All branches are traced, unless `target_platform` names a single platform.
    """
    if _TARGET.value not in _SINGLE_PLATFORMS:
        return lax.platform_dependent(*operands, default=default, **branches)
    return branches.get(_TARGET.value, default)(*operands)


def may_run_on(platform: str) -> bool:
    """Tells whether the program that is being traced may run on a platform."""
    return _TARGET.value in (None, platform)


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Restricts the programs traced within it, or in a function it decorates, to one platform.

    The program for that platform stays the same. Tracing takes less time, since no other
    platform's branches are traced.

    Args:
      platform: "cpu", "gpu" or "tpu"; for "gpu" all branches are traced.
    """
    with _TARGET(platform):
        yield


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Keeps kernels that `jax.export` refuses out of the programs traced within it.

    Those are cuDNN's: which of them a process traces depends on its GPUs and its version of cuDNN.
    """
    with _EXPORTABLE(True):
        yield


def must_be_exportable() -> bool:
    """Tells whether the program that is being traced is one of `exportable`."""
    return _EXPORTABLE.value
