"""The console of a run: text is shown as it is, whatever names of labels, cases and paths hold."""

from rich.console import Console


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Makes a console that never reads text as rich's markup, emoji codes or numbers to color.

    Args:
      quiet: print nothing.
      stderr: print to the standard error instead of the standard output.
    """
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)
