"""Models that come with this package or with others, under names of their own: ``zoo:NAME``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...core.errors import BadInput, near_misses
from ...fx.view import FxView
from .minilm import load_minilm
from .tiny_llama import load_tiny_llama
from .tiny_vision import (
    load_tiny_llava,
    load_tiny_llava_details,
    load_tiny_llava_next,
    load_tiny_vit,
)

ZOO: dict[str, Callable[..., FxView]] = {
    "minilm": load_minilm,
    "tiny-llama": load_tiny_llama,
    "tiny-llava": load_tiny_llava,
    "tiny-llava-details": load_tiny_llava_details,
    "tiny-llava-next": load_tiny_llava_next,
    "tiny-vit": load_tiny_vit,
}


WITH_CACHE = ("tiny-llama", "tiny-llava", "tiny-llava-details", "tiny-llava-next")
"""Models that write text: their loaders also take ``cache``."""


def load_zoo(name: str, *, dtype: torch.dtype | None = None, cache: bool | None = None) -> FxView:
    """The model ``zoo:name``; one that writes text has its key-value cache, unless ``cache`` is
    false.

    Raises ``BadInput`` for an unknown name and for a true ``cache`` of a model that writes no text,
    ``Missing`` without the model's package.
    """
    if name not in ZOO:
        raise BadInput(f"unknown model zoo:{name}; {near_misses(name, ZOO)}")
    if cache is None:
        cache = name in WITH_CACHE
    if not cache:
        return ZOO[name](dtype)
    if name not in WITH_CACHE:
        raise BadInput(f"zoo:{name} does not generate text, so it has no cache to export")
    return ZOO[name](dtype, cache=True)
