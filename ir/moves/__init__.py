"""The graph surgeries that every method is made of: ``swap`` a linear, ``graft`` a side path."""

from .graft import graft, graft_low_rank
from .swap import swap

__all__ = ["graft", "graft_low_rank", "swap"]
