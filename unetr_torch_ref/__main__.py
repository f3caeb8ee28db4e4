"""Command line: `python -m unetr_torch_ref summary` prints the article's table of layers."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from unetr_torch_ref.summary import Summary, summarize
from unetr_torch_ref.unetr import UNETR

_KINDS = {int: "an integer", float: "a number"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Prints one line only: the usage that argparse prints first would hide the error.
        self.exit(2, f"{self.prog}: error: {message}\n")


def _within(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Makes a type for argparse that takes numbers from low to high."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be {_KINDS[kind]} from {low} to {high}")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m unetr_torch_ref", description="The PyTorch reference of UNETR."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    summary = verbs.add_parser(
        "summary",
        help="print the table of layers",
        description="Print every layer with its output shape and number of parameters, and the "
        "sums. Nothing is computed, so it needs neither memory nor time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = summary.add_argument
    # The product of three sizes up to this limit fits into 64 bits.
    size = _within(int, 1, 2**20)
    add(
        "--img-size",
        type=size,
        nargs="+",
        default=[128],
        metavar="VOXELS",
        help="size of the image, one number for a cube or three",
    )
    add("--in-channels", metavar="C", type=size, default=1, help="channels of the image")
    add(
        "--out-channels",
        metavar="C",
        type=size,
        default=4,
        help="classes, each a channel of the logits",
    )
    add(
        "--patch-size",
        type=size,
        nargs="+",
        default=[16],
        metavar="VOXELS",
        help="size of a patch, one number or three; each 1, 2, 4, 8 or 16",
    )
    add(
        "--light-r",
        metavar="R",
        type=_within(float, 2**-10, 32),
        default=4,
        help="divisor of the decoder's widths",
    )
    add(
        "--num-heads",
        metavar="H",
        type=size,
        default=8,
        help="attention heads; divides --embed-dim",
    )
    add("--embed-dim", metavar="E", type=size, default=768, help="width of the tokens")
    add(
        "--part",
        choices=["model", "transformer"],
        default="model",
        help="the whole model, or its transformer blocks with the tokens as input",
    )
    return parser


def _summary(args: argparse.Namespace) -> Summary:
    """Builds the model on the meta device and summarizes it."""
    with torch.device("meta"):
        model = UNETR(
            img_shape=_per_axis(args.img_size),
            input_dim=args.in_channels,
            output_dim=args.out_channels,
            embed_dim=args.embed_dim,
            patch_size=_per_axis(args.patch_size),
            num_heads=args.num_heads,
            light_r=args.light_r,
        )
    if args.part == "transformer":
        return summarize(model.transformer, (model.embedding.n_patches, model.embed_dim))
    return summarize(model, (model.input_dim, *model.img_shape))


def _per_axis(values: list[int]) -> tuple[int, ...]:
    """Repeats a single value for each of the three axes."""
    return tuple(values * 3 if len(values) == 1 else values)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 and one line on stderr if a value is not allowed."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        print(_summary(args))
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        # PyTorch raises this for tensors whose sizes do not fit into 64 bits.
        parser.error(f"sizes must be smaller: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
