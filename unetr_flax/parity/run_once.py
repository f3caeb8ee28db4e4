"""Compiling programs that are run once or a few times, as comparisons do."""

from collections.abc import Callable
from typing import Any

import jax

from unetr_flax import ops
from unetr_flax.runtime.aot import aot_compile
from unetr_flax.runtime.compiler_options import options_to_run_once


def jit_to_run_once(function: Callable[..., Any]) -> jax.stages.Wrapped:
    """Does `jax.jit(function)` for the default platform such that tracing and compiling are short.

    Operations, and what each of them computes, are the same.
    """
    platform = jax.default_backend()
    targeted = ops.target_platform(platform)(function)
    return jax.jit(targeted, compiler_options=options_to_run_once(platform))


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """Does `jax.jit(function)(*args)` in less time, for a single call."""
    return aot_compile(jit_to_run_once(function), *args)(*args)
