"""The regions of a model that predicts overlapping structures, and their way back to classes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from unetr_flax.weights.errors import CheckpointError

# Bits of the code of a voxel, see `RegionRestorer`.
MOST_REGIONS = 64


@dataclasses.dataclass(frozen=True)
class Regions:
    """The regions that a model predicts, each by a sigmoid of its own.

    Regions that were joined from classes turn back into a label map by painting: regions are
    painted one over the other, each with one class id, as nnU-Net does in the order of its
    `regions_class_order`.

    Attributes:
      names: name of each region, in the order of the model's outputs.
      painted: (region, class id) pairs in the order of painting; empty if regions have no such
        order, so that only one mask per region can tell where they are.
      classes: name of each class id of the label map; of the masks, each of which counts as the
        class of its number from 1, if nothing is painted.
    """

    names: tuple[str, ...]
    painted: tuple[tuple[int, int], ...]
    classes: dict[int, str]

    @classmethod
    def from_ids(
        cls, names: Sequence[str], ids: Sequence[Sequence[int]] = (), order: Sequence[int] = ()
    ) -> Self:
        """Finds out whether regions turn back into classes, and how.

        Without a declared order, regions must be nested or disjoint, and each must have exactly one
        class that no region inside it has; then larger regions are painted first.

        Args:
          names: name of each region.
          ids: class ids of each region; empty if the regions came as masks.
          order: class id that each region is painted with, in the order of the regions, as
            nnU-Net's `regions_class_order`; empty if none is declared.

        Raises:
          ValueError: if there are more than `MOST_REGIONS`, or names are not different.
        """
        if len(names) > MOST_REGIONS:
            raise ValueError(f"regions: {len(names)}, must be at most {MOST_REGIONS}")
        if len({"background", *names}) <= len(names):
            raise ValueError(
                f"regions: {', '.join(names)}: must be different names, none of them background"
            )
        names, members = tuple(names), [frozenset(region) for region in ids]
        painted = tuple(enumerate(order)) if order else _nested_order(members)
        if not painted:
            return cls(names, (), dict(enumerate(("background", *names))))
        classes = {0: "background"}
        for position, (region, class_id) in enumerate(painted):
            above = [over for over, _ in painted[position + 1 :] if members[over] & members[region]]
            # A region inside of another one that is named already needs no mention.
            outer = [o for o in above if not any(members[o] < members[p] for p in above)]
            without = f" without {' and '.join(names[o] for o in outer)}" if outer else ""
            classes[class_id] = names[region] + without
        return cls(names, painted, classes)

    @classmethod
    def from_provenance(cls, path: Path, provenance: Any) -> Self | None:
        """Reads the regions that a model folder tells; None if the model predicts classes.

        Args:
          path: the model folder, for messages.
          provenance: where the weights came from, as the folder tells it.

        Raises:
          CheckpointError: if what the folder tells is not what training writes, or what
            `from_ids` refuses.
        """
        if not isinstance(provenance, dict) or not provenance.get("regions"):
            return None
        names, ids = provenance["regions"], provenance.get("region_ids") or []
        order = provenance.get("regions_class_order") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: regions: must be a list of names, not {names!r}")
        lists = isinstance(ids, list) and all(_are_ids(region) and region for region in ids)
        if not lists or len(ids) not in (0, len(names)):
            raise CheckpointError(
                f"{path}: region_ids: must be a list of class ids above 0 for each of the "
                f"{len(names)} regions, not {ids!r}"
            )
        if not _are_ids(order) or (order and not len(order) == len(ids) == len(set(order))):
            raise CheckpointError(
                f"{path}: regions_class_order: must be a different class id above 0 for each of "
                f"the {len(names)} regions, not {order!r}"
            )
        try:
            return cls.from_ids(names, ids, order)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def check_outputs(self, number: int) -> None:
        """Raises ValueError unless a model with this number of outputs has one for each region."""
        if len(self.names) != number:
            raise ValueError(
                f"regions {', '.join(self.names)}: must be {number}, one for each output of the "
                "model"
            )

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Makes a label map, or masks where regions have no order of painting.

        Args:
          codes: the sum of 2^r over the regions r that hold each voxel, integers [X, Y, Z].

        Returns:
          Class ids [X, Y, Z] in the smallest unsigned integers, or 0 and 1 [X, Y, Z, R], uint8.
        """
        if not self.painted:
            masks = np.empty((*codes.shape, len(self.names)), np.uint8)
            for region in range(len(self.names)):
                masks[..., region] = codes >> region & 1
            return masks
        labels = np.zeros(codes.shape, np.min_scalar_type(max(self.classes)))
        for plane, code in zip(labels, codes, strict=True):
            for region, class_id in self.painted:
                plane[(code >> region & 1).astype(bool)] = class_id
        return labels

    def describe(self) -> str:
        """Says in one line what is written for the regions."""
        names = ", ".join(self.names)
        if not self.painted:
            return f"regions {names}: written as 4D masks, one volume for each region"
        classes = ", ".join(f"{i} {self.classes[i]}" for i in sorted(self.classes) if i)
        return f"regions {names}: written as label maps of {classes}"


def _nested_order(members: Sequence[frozenset[int]]) -> tuple[tuple[int, int], ...]:
    """Finds the order of painting of nested regions; empty if there is none."""
    painted: list[tuple[int, int]] = []
    for region in sorted(range(len(members)), key=lambda region: -len(members[region])):
        whole, own = members[region], set(members[region])
        for other in members:
            if other & whole and not (other <= whole or whole <= other):
                return ()
            if other < whole:
                own -= other
        if len(own) != 1:
            return ()
        painted.append((region, own.pop()))
    # Two equal regions would be painted with the same class.
    distinct = len({class_id for _, class_id in painted}) == len(painted)
    return tuple(painted) if distinct else ()


def _are_ids(values: Any) -> bool:
    """Whether values are a list of class ids that a label map can hold."""
    return isinstance(values, list) and all(
        type(value) is int and 0 < value <= np.iinfo(np.uint16).max for value in values
    )
