"""The graph surgeries that every method is made of: ``swap`` a linear, ``graft`` a side path."""

from .graft import graft
from .swap import swap

__all__ = ["graft", "swap"]
