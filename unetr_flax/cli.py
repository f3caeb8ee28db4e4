"""The command `unetr`: parses and delegates."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

import tyro

from unetr_flax.commands.arguments import positionals_first
from unetr_flax.commands.verdict import Verdict

# Each is a function of the same name in a module of the same name in `commands`.
VERBS = ("predict", "evaluate", "convert", "verify", "summary", "export")


def main() -> int:
    """Runs the command line.

    Returns:
      0; or 2 after one line that says what is wrong with what was given; or 1 after one line that
      says how two models differ, or how many cases failed; or 130 after Ctrl-C.
    """
    _silence_loader()
    args = sys.argv[1:]
    try:
        if args and args[0] in VERBS:
            # The other verbs are not imported: some take a second.
            verb = _load(args[0])
            tyro.cli(
                verb,
                prog=f"unetr {args[0]}",
                args=positionals_first(verb, args[1:]),
                config=(tyro.conf.OmitArgPrefixes,),
            )
        else:
            app = tyro.extras.SubcommandApp()
            for verb in VERBS:
                app.command(_load(verb))
            app.cli(
                prog="unetr",
                description="UNETR for volumetric segmentation in JAX/Flax.",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except KeyboardInterrupt:
        print("unetr: interrupted", file=sys.stderr)
        return 130
    except Verdict as error:
        print(f"unetr: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"unetr: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _load(verb: str) -> Callable[..., None]:
    return getattr(importlib.import_module(f"unetr_flax.commands.{verb}"), verb)


def _silence_loader() -> None:
    """Silences XLA's loader, where there is only a CPU."""
    # It logs at length about each CPU program that it reads from the compilation cache that the
    # host may lack a feature, which is none (openxla/xla#44565). Only its whole log can be
    # silenced, and only before JAX is imported.
    if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _one_line(error: Exception) -> str:
    """Shortens a message of many lines to the first line and the first item that it lists."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    if not others:
        return first
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{first}: {others[0].strip()}{more}"
