"""The modules and arrays of a configuration, with their names in PyTorch and in Flax."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.families import family_of
from unetr_flax.weights.layouts import Layout
from unetr_flax.weights.tables import Table


@dataclasses.dataclass(frozen=True)
class ModulePair:
    """A module that both models have.

    Attributes:
      torch_name: its name in the PyTorch model.
      flax_path: its path in the Flax model.
      kind: its kind, as in the table of names.
    """

    torch_name: str
    flax_path: tuple[str, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class ArrayPair:
    """An array that both models have.

    Attributes:
      torch_keys: its key in the state dict; several keys if Flax stacks several PyTorch arrays.
      flax_path: its path in the variables, collection first.
      layout: the layout of the array, or of the stack.
    """

    torch_keys: tuple[str, ...]
    flax_path: tuple[str, ...]
    layout: Layout


def table_of(cfg: UNETRConfig) -> Table:
    """Returns the names of modules and arrays of a configuration."""
    return family_of(cfg).table(cfg)


def module_pairs(cfg: UNETRConfig) -> Iterator[ModulePair]:
    """Yields every module that both models have, outer before inner, block by block."""
    return modules_of(table_of(cfg), cfg.num_layers)


def modules_of(table: Table, num_layers: int) -> Iterator[ModulePair]:
    """Yields every module of a table, outer before inner, block by block."""
    for repeated, rows in itertools.groupby(table.rows, key=lambda row: "{layer}" in row[0]):
        block = list(rows)
        for layer in range(num_layers if repeated else 1):
            for torch_name, flax_path, kind in block:
                path = tuple(flax_path.format(layer=layer).split("/"))
                module = ModulePair(torch_name.format(layer=layer), path, kind)
                yield from with_parts(module, table)


def with_parts(module: ModulePair, table: Table) -> Iterator[ModulePair]:
    """Yields a module and all modules that it is made of, outer before inner."""
    yield module
    for torch_name, flax_name, kind in table.parts.get(module.kind, ()):
        path = (*module.flax_path, flax_name) if flax_name else module.flax_path
        yield from with_parts(ModulePair(_join(module.torch_name, torch_name), path, kind), table)


def array_pairs(modules: Iterable[ModulePair], table: Table) -> list[ArrayPair]:
    """Returns the arrays that modules own themselves, once each."""
    pairs = []
    for module in modules:
        for names, collection, path, layout in table.arrays.get(module.kind, ()):
            names = (names,) if isinstance(names, str) else names
            keys = tuple(_join(module.torch_name, name) for name in names)
            pairs.append(ArrayPair(keys, (collection, *module.flax_path, *path.split("/")), layout))
    return pairs


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
