"""The graph surgeries that every method is made of.

``swap`` a linear, ``graft`` a side path, ``bypass`` a block or ``follow`` a path through blocks,
``shrink`` a token axis, that of a prompt or that of a tower's pictures, ``shrink_channels`` from
linears to the next one, ``factorize`` a linear, ``rescale`` what linears read, ``rotate_stream``
and ``rotate_heads`` into another basis.
"""

from .block_path import Path
from .bypass_blocks import bypass, follow
from .factorize_linear import factorize
from .graft_path import Factor, graft, graft_low_rank
from .rescale import Inlet, find_inlets, rescale
from .rotate import Stream, find_stream, heads_of, rotate_heads, rotate_stream
from .shrink_channels import (
    Kept,
    Shrunk,
    kept_heads,
    kept_units,
    reason_against_shrinking,
    shrink_channels,
)
from .shrink_dim import shrink
from .shrink_pictures import shrink_pictures
from .swap_linear import swap

__all__ = [
    "Factor",
    "Inlet",
    "Kept",
    "Path",
    "Shrunk",
    "Stream",
    "bypass",
    "factorize",
    "find_inlets",
    "find_stream",
    "follow",
    "graft",
    "graft_low_rank",
    "heads_of",
    "kept_heads",
    "kept_units",
    "reason_against_shrinking",
    "rescale",
    "rotate_heads",
    "rotate_stream",
    "shrink",
    "shrink_channels",
    "shrink_pictures",
    "swap",
]
