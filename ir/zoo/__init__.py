"""Models that come with this package or with others, under names of their own: ``zoo:NAME``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import BadInput, near_misses
from ..fx import FxView
from .minilm import load_minilm
from .tiny_llama import load_tiny_llama
from .tiny_vision import load_tiny_llava, load_tiny_vit

ZOO: dict[str, Callable[[torch.dtype | None], FxView]] = {
    "minilm": load_minilm,
    "tiny-llama": load_tiny_llama,
    "tiny-llava": load_tiny_llava,
    "tiny-vit": load_tiny_vit,
}


def load_zoo(name: str, *, dtype: torch.dtype | None = None) -> FxView:
    """The model ``zoo:name``. ``BadInput`` for an unknown name, ``Missing`` without its package."""
    if name not in ZOO:
        raise BadInput(f"unknown model zoo:{name}; {near_misses(name, ZOO)}")
    return ZOO[name](dtype)
