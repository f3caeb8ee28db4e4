"""Which PyTorch module and array is which Flax module and array, for a configuration."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from unetr_flax.model.config import UNETRConfig
from unetr_flax.weights.families.monai import monai_table
from unetr_flax.weights.families.reference import REFERENCE
from unetr_flax.weights.families.tamasino52 import TAMASINO52
from unetr_flax.weights.layouts import Layout
from unetr_flax.weights.tables import Table


@dataclasses.dataclass(frozen=True)
class ModulePair:
    """A module of both models: its PyTorch name, its Flax path, its kind."""

    torch_name: str
    flax_path: tuple[str, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class ArrayPair:
    """An array of both models: its keys in the state dict, its path in the variables, its layout.

    Where PyTorch has several arrays, they are stacked, and the layout is that of the stack.
    """

    torch_keys: tuple[str, ...]
    flax_path: tuple[str, ...]
    layout: Layout


def table_of(cfg: UNETRConfig) -> Table:
    """The names of a configuration's family."""
    if cfg.family == "monai":
        return monai_table(cfg)
    return {"reference": REFERENCE, "tamasino52": TAMASINO52}[cfg.family]


def module_pairs(cfg: UNETRConfig) -> Iterator[ModulePair]:
    """Every module that both models have, outer before inner, block by block."""
    table = table_of(cfg)
    for repeated, rows in itertools.groupby(table.rows, key=lambda row: "{layer}" in row[0]):
        block = list(rows)
        for layer in range(cfg.num_layers if repeated else 1):
            for torch_name, flax_path, kind in block:
                path = tuple(flax_path.format(layer=layer).split("/"))
                module = ModulePair(torch_name.format(layer=layer), path, kind)
                yield from with_parts(module, table)


def with_parts(module: ModulePair, table: Table) -> Iterator[ModulePair]:
    """A module and all that it is made of, outer before inner."""
    yield module
    for torch_name, flax_name, kind in table.parts.get(module.kind, ()):
        path = (*module.flax_path, flax_name) if flax_name else module.flax_path
        yield from with_parts(ModulePair(_join(module.torch_name, torch_name), path, kind), table)


def array_pairs(modules: Iterable[ModulePair], table: Table) -> list[ArrayPair]:
    """The arrays that the modules own, once each."""
    pairs = []
    for module in modules:
        for names, collection, path, layout in table.arrays.get(module.kind, ()):
            names = (names,) if isinstance(names, str) else names
            keys = tuple(_join(module.torch_name, name) for name in names)
            pairs.append(ArrayPair(keys, (collection, *module.flax_path, *path.split("/")), layout))
    return pairs


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
