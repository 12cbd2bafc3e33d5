"""The graph surgeries that every method is made of.

``swap`` a linear, ``graft`` a side path, ``bypass`` a block or ``follow`` a path through blocks,
``shrink`` a token axis.
"""

from .bypass import Path, bypass, follow
from .graft import graft, graft_low_rank
from .shrink import shrink
from .swap import swap

__all__ = ["Path", "bypass", "follow", "graft", "graft_low_rank", "shrink", "swap"]
