"""The verbs of the command `unetr`, one module each."""
