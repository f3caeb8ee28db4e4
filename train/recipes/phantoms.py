"""CT-like phantoms that the program makes itself: what `python -m train` does without options."""

from train.command_line import PHANTOMS

RECIPE = PHANTOMS
