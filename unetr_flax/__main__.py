"""python -m unetr_flax: the command `unetr`."""

import sys

from unetr_flax.cli import main

if __name__ == "__main__":
    sys.exit(main())
