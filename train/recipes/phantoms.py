"""CT-like phantoms that the program makes itself: what `python -m train` does without options."""

from train.config import PHANTOMS

RECIPE = PHANTOMS
