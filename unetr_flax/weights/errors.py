"""Errors about checkpoints and weights."""


class CheckpointError(ValueError):
    """A file or object that cannot be used as a checkpoint; the message is one line."""


class WeightsError(ValueError):
    """Weights that do not fit the model; the message lists every misfit."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if there is none."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
