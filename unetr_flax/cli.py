"""The command `unetr`: parses and delegates."""

import sys

import tyro

from unetr_flax.commands.convert import convert
from unetr_flax.commands.export import export
from unetr_flax.commands.summary import summary
from unetr_flax.commands.verify import ParityError, verify

app = tyro.extras.SubcommandApp()
for verb in (convert, verify, summary, export):
    app.command(verb)


def main() -> int:
    """Runs the command line.

    Returns:
      0; or 2 after one line that says what is wrong with what was given; or 1 after one line that
      says how two models differ.
    """
    try:
        app.cli(
            prog="unetr",
            description="UNETR for volumetric segmentation in JAX/Flax.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except ParityError as error:
        print(f"unetr: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"unetr: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    """Shortens a message of many lines to the first line and the first item that it lists."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    if not others:
        return first
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{first}: {others[0].strip()}{more}"
