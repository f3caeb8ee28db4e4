"""Sites: every module, and everything between two modules, with its values in both models."""

from unetr_flax.parity.sites.find import find_sites
from unetr_flax.parity.sites.site import Site

__all__ = ["Site", "find_sites"]
