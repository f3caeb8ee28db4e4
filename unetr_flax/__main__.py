"""python -m unetr_flax: the command `unetr`."""

from unetr_flax.cli import command

if __name__ == "__main__":
    command()
