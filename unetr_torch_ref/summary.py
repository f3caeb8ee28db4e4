"""The article's table of layers: one row for each module, in the order in which they finish.

The numbers follow torchsummary 1.5.1, with which the article printed its tables.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

# torchsummary counts four bytes for every number.
MB_PER_NUMBER = 4 / 1024**2


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of a module.

    Attributes:
      name: class name and number of the row, from 1.
      output_shape: shape with -1 for the batch; a list of shapes if the module returns a list.
      params: elements of the module's own `weight` and `bias`, without its submodules'.
      trainable: number of these elements that get gradients.
    """

    name: str
    output_shape: list
    params: int
    trainable: int

    @property
    def numbers(self) -> int:
        """Elements of the output for one volume, 0 for a list of tensors.

        torchsummary multiplies the sizes of all tensors in a list, which for the article's four
        [512, 768] overflows 64 bits and gives exactly 0.
        """
        shape = self.output_shape
        return 0 if isinstance(shape[0], list) else math.prod(shape[1:])


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a module, their sums, and what they leave out.

    Attributes:
      rows: calls of all submodules except containers, in order of completion.
      input_shape: shape of one input, without the batch.
      uncounted: number of elements, by name, of parameters that are in no row.
    """

    rows: tuple[Row, ...]
    input_shape: tuple[int, ...]
    uncounted: dict[str, int]

    @property
    def total_params(self) -> int:
        """Number of parameters in all rows."""
        return sum(row.params for row in self.rows)

    @property
    def all_params(self) -> int:
        """Number of parameters of the module, including those that are in no row."""
        return self.total_params + sum(self.uncounted.values())

    @property
    def input_mb(self) -> float:
        """Size of one input in MiB."""
        return math.prod(self.input_shape) * MB_PER_NUMBER

    @property
    def forward_backward_mb(self) -> float:
        """Size in MiB of all outputs for one volume and of their gradients."""
        return 2 * sum(row.numbers for row in self.rows) * MB_PER_NUMBER

    @property
    def params_mb(self) -> float:
        """Size in MiB of the parameters in the rows."""
        return self.total_params * MB_PER_NUMBER

    @property
    def total_mb(self) -> float:
        """Sum of the three sizes in MiB."""
        return self.input_mb + self.forward_backward_mb + self.params_mb

    def __str__(self) -> str:
        trainable = sum(row.trainable for row in self.rows)
        line, double_line = "-" * 64, "=" * 64
        return "\n".join(
            [
                line,
                _columns("Layer (type)", "Output Shape", "Param #"),
                double_line,
                *(_columns(r.name, str(r.output_shape), f"{r.params:,}") for r in self.rows),
                double_line,
                f"Total params: {self.total_params:,}",
                f"Trainable params: {trainable:,}",
                f"Non-trainable params: {self.total_params - trainable:,}",
                *(f"Not in a row: {name} {count:,}" for name, count in self.uncounted.items()),
                f"Params in all: {self.all_params:,}",
                line,
                f"Input size (MB): {self.input_mb:.2f}",
                f"Forward/backward pass size (MB): {self.forward_backward_mb:.2f}",
                f"Params size (MB): {self.params_mb:.2f}",
                f"Estimated Total Size (MB): {self.total_mb:.2f}",
                line,
            ]
        )


def summarize(module: nn.Module, input_shape: Sequence[int]) -> Summary:
    """Makes the rows and sums of a module for one input.

    The function works on a copy on the meta device, which has shapes only: nothing is computed, and
    the module is not changed. A module that was built on that device needs no memory either.

    Args:
      module: the module.
      input_shape: shape of one input, without the batch.
    """
    module = copy.deepcopy(module).to("meta").eval()
    rows: list[Row] = []

    def add_row(called: nn.Module, args: tuple, output: torch.Tensor | list[torch.Tensor]) -> None:
        own = [p for p in (_own(called, "weight"), _own(called, "bias")) if p is not None]
        rows.append(
            Row(
                name=f"{type(called).__name__}-{len(rows) + 1}",
                output_shape=[_shape(o) for o in output]
                if isinstance(output, list)
                else _shape(output),
                params=sum(p.numel() for p in own),
                trainable=sum(p.numel() for p in own if p.requires_grad),
            )
        )

    counted = set()
    for submodule in module.modules():
        if submodule is not module and not isinstance(submodule, (nn.Sequential, nn.ModuleList)):
            submodule.register_forward_hook(add_row)
            counted |= {id(_own(submodule, "weight")), id(_own(submodule, "bias"))}
    module(torch.empty(1, *input_shape, device="meta"))
    return Summary(
        rows=tuple(rows),
        input_shape=tuple(input_shape),
        uncounted={n: p.numel() for n, p in module.named_parameters() if id(p) not in counted},
    )


def _own(module: nn.Module, name: str) -> torch.Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _shape(output: torch.Tensor) -> list[int]:
    return [-1, *output.shape[1:]]


def _columns(name: str, shape: str, params: str) -> str:
    return f"{name:>20}  {shape:>25} {params:>15}"
