"""The option --regions of commands that take PyTorch files, whose outputs may be sigmoids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unetr_flax.inference.regions import Regions


def tell_regions(path: Path, provenance: Any, option: Sequence[str] | None) -> Any:
    """Adds the regions that --regions tells to the provenance of a model.

    Args:
      path: the model, for messages.
      provenance: where its weights came from.
      option: the value of --regions; None if it is not given.

    Returns:
      The provenance, which tells regions in the way of a trained model's.

    Raises:
      ValueError: if the option has another form, or the model tells regions itself.
    """
    if option is None:
        return provenance
    own = Regions.from_provenance(path, provenance)
    if own is not None:
        raise ValueError(f"--regions: {path} tells itself that it predicts {', '.join(own.names)}")
    return add_facts(provenance, _parse(option))


def add_facts(provenance: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Adds facts to a provenance, which can be any JSON."""
    if not isinstance(provenance, dict):
        provenance = {} if provenance is None else {"source": provenance}
    return {**provenance, **facts}


def _parse(option: Sequence[str]) -> dict[str, Any]:
    """Reads names of regions, or all of them with class ids."""
    if any("=" in region for region in option):
        from unetr_flax.evaluation.structures import parse_regions

        named = parse_regions(option)
        return {"regions": list(named), "region_ids": [list(ids) for ids in named.values()]}
    if not option or not all(option):
        raise ValueError(
            f"--regions {' '.join(option)}: must be a name for each output of the model, such as "
            "TC WT ET, or with class ids TC=1,3 WT=1,2,3 ET=3"
        )
    return {"regions": list(option)}
