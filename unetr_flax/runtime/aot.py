"""Compiling a jitted function ahead of its first call, in the foreground or in the background."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import jax

from unetr_flax.runtime.garbage import collector_paused
from unetr_flax.runtime.malloc import return_freed_memory

R = TypeVar("R")


def aot_compile(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Does `function.lower(*args).compile()` faster, and returns the memory used on the way.

    The garbage collector is off meanwhile, see `garbage.collector_paused`. Afterwards freed memory
    goes back to the kernel: getting some of it again is cheap.

    Args:
      function: a function of `jax.jit`.
      *args: its arguments, as arrays or as their shapes and dtypes.

    Returns:
      The compiled program, which takes arrays of these shapes and dtypes only.
    """
    with collector_paused():
        compiled = function.lower(*args).compile()
    return_freed_memory()
    return compiled


class BackgroundProgram(Generic[R]):
    """A jitted function that is being compiled in the background; calling it runs the program.

    Attributes:
      wait: waits until compiling and checking are done, and raises the error of either. Unlike
        compiling itself, waiting can be interrupted.
    """

    def __init__(
        self,
        function: Callable[..., R],
        args: Sequence[Any],
        check: Callable[[jax.stages.Compiled], None],
        settings: Callable[[], AbstractContextManager[Any]],
    ):
        def compile_and_check() -> jax.stages.Compiled:
            with settings():
                program = aot_compile(function, *args)
            check(program)
            return program

        pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        compiled = pool.submit(compile_and_check)
        pool.shutdown(wait=False)
        functools.update_wrapper(self, function)
        self.wait: Callable[[], Any] = compiled.result

    def __call__(self, *args: Any) -> R:
        return self.wait()(*args)


def compile_in_background(
    function: Callable[..., R],
    *args: Any,
    check: Callable[[jax.stages.Compiled], None] = lambda compiled: None,
    settings: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> BackgroundProgram[R]:
    """Starts to compile a jitted function and returns one that calls the compiled program.

    A call of the result waits until compiling is done and raises the error that compiling or
    `check` raised.

    Args:
      function: a function of `jax.jit`.
      *args: its arguments, as arrays or as their shapes, dtypes and shardings.
      check: called with the compiled program in the background, before its first call.
      settings: makes a context manager for compiling; those of JAX that hold in this thread do
        not hold in the background.
    """
    return BackgroundProgram(function, args, check, settings)
