"""Entries of state dicts that count training steps and are no weights."""

import numbers
from typing import Any

# PyTorch's batch norms count batches, for an option that UNETR does not use.
BATCH_COUNTER = "num_batches_tracked"

# torch.optim.swa_utils.AveragedModel counts the models it averaged; training scripts count epochs.
COUNTERS = (BATCH_COUNTER, "n_averaged", "epoch")


def is_counter(key: Any, value: Any) -> bool:
    """Returns whether an entry is a single number named like a counter, behind any prefix."""
    if not isinstance(key, str) or key.rpartition(".")[2] not in COUNTERS:
        return False
    return isinstance(value, numbers.Real) or tuple(getattr(value, "shape", (None,))) == ()
