"""The choice of a lowering by the platform that a program runs on, which tracing leaves open."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

_ONLY = jax.make_user_context()

# "gpu" stands for several of XLA's platforms.
_ONE_PLATFORM = ("cpu", "tpu")


def by_platform(*operands: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """`jax.lax.platform_dependent`; `target_platform` leaves one branch to be traced."""
    if _ONLY.value not in _ONE_PLATFORM:
        return lax.platform_dependent(*operands, default=default, **branches)
    return branches.get(_ONLY.value, default)(*operands)


def in_program() -> bool:
    """Whether `target_platform` traces: nobody looks into modules then, but time counts."""
    return _ONLY.value is not None


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """What is traced within, or in a function that this decorates, is for one platform only.

    Its program there is the same, but for the random numbers of dropout, and tracing takes half of
    the time: there is one branch, and equal transformer blocks are traced once.

    Args:
      platform: "cpu", "gpu" or "tpu"; with "gpu" all branches are traced.
    """
    with _ONLY(platform):
        yield
