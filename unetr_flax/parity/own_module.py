"""A PyTorch module of somebody's own: a known family with changes, and a checkpoint in it."""

import collections
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.torch_models import TorchModelError
from unetr_flax.weights.convert import drop_unused
from unetr_flax.weights.counters import COUNTERS
from unetr_flax.weights.torch_files import to_tensor
from unetr_flax.weights.unused_keys import known_unused
from unetr_flax.weights.unwrap import unwrap


def load_module(place: str) -> torch.nn.Module:
    """Runs a file of Python and the function in it that makes a module.

    Args:
      place: "FILE.py:FACTORY", where FACTORY() returns the module.

    Raises:
      TorchModelError: if there is no such file or function, or it makes no module.
    """
    file, colon, factory = place.rpartition(":")
    if not colon or not file or not factory.isidentifier():
        raise TorchModelError(f"{place}: must be FILE.py:FACTORY")
    path = Path(file)
    if not path.is_file():
        raise TorchModelError(f"{file}: no such file")
    name = f"_unetr_own_module_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TorchModelError(f"{file}: must be a file of Python, NAME.py")
    loaded = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that they are defined in, under a name that hides no other.
    sys.modules[name] = loaded
    # The file may import its neighbors, as when it is run as a script.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(loaded)
        make = getattr(loaded, factory, None)
        if not callable(make):
            raise TorchModelError(f"{file}: has no function {factory}")
        module = make()
    except TorchModelError:
        raise
    except Exception as error:
        raise TorchModelError(f"{place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(module, torch.nn.Module):
        raise TorchModelError(f"{place}: returned {type(module).__name__}, not a torch.nn.Module")
    return module


def adopt(
    module: torch.nn.Module, state_dict: Mapping[str, Any], cfg: UNETRConfig
) -> tuple[str, list[str]]:
    """Gives a module the weights of a state dict, as far as it has them.

    Args:
      module: somebody's own module, changed in place, to float64.
      state_dict: the checkpoint's weights, as for `from_torch`.
      cfg: the checkpoint's configuration.

    Returns:
      The prefix that the family's names have in the module; and lines that say which weights only
      one of them has, or in another shape.

    Raises:
      TorchModelError: if none of the names is known.
    """
    given, _ = drop_unused(unwrap(state_dict)[0], cfg)
    # Narrower parameters would round the weights of a float64 checkpoint.
    own = module.double().state_dict()
    prefix = _prefix(list(own), set(given))
    notes, taken = [], {}
    for key, value in given.items():
        tensor, name = to_tensor(value), prefix + key
        if name not in own:
            notes.append(f"{key}: the module has none")
        elif own[name].shape != tensor.shape:
            shapes = f"{tuple(own[name].shape)}, the checkpoint's {tuple(tensor.shape)}"
            notes.append(f"{key}: the module's shape is {shapes}; not loaded")
        else:
            taken[name] = tensor
    idle = known_unused(cfg)
    for name in own:
        key = name.removeprefix(prefix)
        if key not in given and key not in idle and key.rpartition(".")[2] not in COUNTERS:
            notes.append(f"{name}: only the module has it; as its factory made it")
    module.load_state_dict(taken, strict=False)
    return prefix, notes


def _prefix(own: list[str], known: set[str]) -> str:
    """Finds the prefix behind which most of the known keys stand."""
    counts: collections.Counter[str] = collections.Counter()
    for name in own:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    if not counts:
        raise TorchModelError(
            f"the module's weights have none of the names of this family, such as {min(known)}"
        )
    return counts.most_common(1)[0][0]
