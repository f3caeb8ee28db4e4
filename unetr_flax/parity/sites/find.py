"""All sites of two models, in forward order."""

from collections.abc import Iterator, Mapping

import numpy as np

from unetr_flax.model.config import UNETRConfig
from unetr_flax.parity.places import ALL_PARTS, LAST_PART
from unetr_flax.parity.record import Recording
from unetr_flax.parity.sites.decoder import decoder_sites
from unetr_flax.parity.sites.encoder import encoder_sites
from unetr_flax.parity.sites.site import Site, Values


def find_sites(
    cfg: UNETRConfig,
    image: np.ndarray,
    ours: Recording,
    theirs: Recording,
    state: Mapping[str, np.ndarray],
    *,
    mask: np.ndarray | None = None,
    train: bool = False,
    parts: frozenset[str] = ALL_PARTS,
) -> Iterator[Site]:
    """Yields the sites in forward order; those that a model does not have are left out.

    Args:
      cfg: the configuration.
      image: [B, C, *img_size], as both models got it.
      ours: the Flax model on PyTorch's inputs, by `run_forced`.
      theirs: the PyTorch model.
      state: weights by PyTorch's names.
      mask: boolean attention mask, if both got one.
      train: whether both ran in training mode.
      parts: the parts whose sites are wanted, of `places.parts_of`.
    """
    values = Values(cfg, image, ours, theirs, state, mask, train, parts)
    if values.wants("encoder"):
        yield from encoder_sites(values)
    yield from decoder_sites(values)
    head = "decoder/head"
    if head in theirs.outputs and values.wants(LAST_PART):
        arrays, right = {"x": values.out(head)}, {"activation": "none"}
        yield Site("logits", "", "logits", arrays, right, ours.logits, theirs.logits)
