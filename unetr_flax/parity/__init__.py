"""Comparison of a port with its original, number by number, and the cause of a difference.

Needs torch, so that nothing of the library imports this package.
"""

from unetr_flax.parity.own_port import Report, Step, assert_parity, compare

__all__ = ["Report", "Step", "assert_parity", "compare"]
