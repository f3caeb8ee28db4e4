"""The command `unetr`: parses and delegates."""

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import tyro

from unetr_flax.commands.arguments import positionals_first
from unetr_flax.commands.verdict import Verdict
from unetr_flax.runtime.ending import end_process, one_line
from unetr_flax.runtime.memory import is_out_of_memory

# Each is a function of the same name in a module of the same name in `commands`.
VERBS = {
    "predict": "Segment scans: label maps on exactly the grid of each scan.",
    "evaluate": "Score predicted label maps against true ones: overlap, surface distances, volume.",
    "convert": "Convert PyTorch weights to a folder that every command takes, or back.",
    "verify": "Run a checkpoint's PyTorch original and its Flax port, and compare every module.",
    "summary": "Print every module with the shapes and numbers of its outputs, and costs.",
    "export": "Export a model's forward pass as a program that runs without this package.",
}


def command() -> NoReturn:
    """Runs the command line and ends the process."""
    end_process(main())


def main() -> int:
    """Runs the command line.

    Returns:
      0; or 2 after one line that says what is wrong with what was given, or that memory ran out; or
      1 after one line that says how two models differ, or how many cases failed; or 130 after
      Ctrl-C; or 141 if nobody reads the output any more.
    """
    _silence_loader()
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    try:
        if name not in VERBS:
            raise ValueError(f"{name}: must be one of {', '.join(VERBS)}; unetr --help tells more")
        # Only this verb is imported: some take a second.
        verb: Callable[..., None] = getattr(
            importlib.import_module(f"unetr_flax.commands.{name}"), name
        )
        tyro.cli(
            verb,
            prog=f"unetr {name}",
            args=positionals_first(verb, args),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except KeyboardInterrupt:
        print("unetr: interrupted", file=sys.stderr)
        return 130
    except Verdict as error:
        print(f"unetr: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has enough, as `head` does after its lines.
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"unetr: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # JAX's error of a device, whose class is not imported here.
        if not is_out_of_memory(error):
            raise
        print(f"unetr: memory ran out: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    verbs = "\n".join(f"  {name:<9} {line}" for name, line in VERBS.items())
    return (
        "usage: unetr VERB [OPTIONS] ...\n\n"
        "UNETR for volumetric segmentation in JAX/Flax.\n\n"
        f"{verbs}\n\nunetr VERB --help tells what a verb takes."
    )


def _silence_loader() -> None:
    """Silences XLA's loader, where there is only a CPU."""
    # It logs at length about each CPU program that it reads from the compilation cache that the
    # host may lack a feature, which is none (openxla/xla#44565). Only its whole log can be
    # silenced, and only before JAX is imported.
    if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
