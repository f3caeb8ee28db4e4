"""The result of a command that ran, but whose answer is no."""


class Verdict(Exception):
    """Two models differ, or cases failed; the message is one line, and the exit status is 1."""
