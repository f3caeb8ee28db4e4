"""What devices exchange in a compiled program, read from its text in XLA's HLO."""

import math
import re
from collections.abc import Collection

Shape = tuple[int, ...]


def collectives(program: str, kind: str) -> list[Shape]:
    """Returns the shapes of the results of a kind of collective operation.

    Args:
      program: text of a compiled program.
      kind: the name of the operation, such as "all-gather".
    """
    results = re.findall(rf"= (\S.*?) {kind}(?:-start)?\(", program)
    return [
        tuple(map(int, sizes.split(",")))
        for result in results
        for sizes in re.findall(r"\w+\[([\d,]+)\]", result)
    ]


def gathered_volumes(program: str, tokens: int, parameters: Collection[Shape]) -> list[Shape]:
    """Returns the shapes of the feature maps that a program gathers on a device, or resplits.

    Devices may gather parameters, and the tokens of their volumes: keys and values of attention.

    Args:
      program: text of a compiled program.
      tokens: numbers in the tokens of one device's volumes, [B, N, E].
      parameters: shapes of the parameters.
    """
    found = [*collectives(program, "all-gather"), *collectives(program, "all-to-all")]
    return [shape for shape in found if math.prod(shape) > tokens and shape not in parameters]
