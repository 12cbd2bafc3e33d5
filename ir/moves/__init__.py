"""The graph surgeries that every method is made of.

``swap`` a linear, ``graft`` a side path, ``bypass`` a block or ``follow`` a path through blocks,
``shrink`` a token axis, that of a prompt or that of a tower's pictures, ``factorize`` a linear.
"""

from .block_path import Path
from .bypass_blocks import bypass, follow
from .factorize_linear import factorize
from .graft_path import Factor, graft, graft_low_rank
from .shrink_dim import shrink
from .shrink_pictures import shrink_pictures
from .swap_linear import swap

__all__ = [
    "Factor",
    "Path",
    "bypass",
    "factorize",
    "follow",
    "graft",
    "graft_low_rank",
    "shrink",
    "shrink_pictures",
    "swap",
]
