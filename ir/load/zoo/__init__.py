"""Models that come with this package or with others, under names of their own: ``zoo:NAME``.

Names are known without torch: a model's loader is imported when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ...core.errors import BadInput, near_misses

if TYPE_CHECKING:
    import torch

    from ...fx.view import FxView

ZOO = {
    "minilm": "minilm:load_minilm",
    "tiny-llama": "tiny_llama:load_tiny_llama",
    "tiny-llava": "tiny_vision:load_tiny_llava",
    "tiny-llava-details": "tiny_vision:load_tiny_llava_details",
    "tiny-llava-next": "tiny_vision:load_tiny_llava_next",
    "tiny-video": "tiny_vision:load_tiny_video",
    "tiny-vit": "tiny_vision:load_tiny_vit",
}
"""Each model's loader: its module here, and its name there."""


WITH_CACHE = ("tiny-llama", "tiny-llava", "tiny-llava-details", "tiny-llava-next", "tiny-video")
"""Models that write text: their loaders also take ``cache``."""


def check_zoo(name: str) -> None:
    """Raises ``BadInput`` where there is no ``zoo:name``."""
    if name not in ZOO:
        raise BadInput(f"unknown model zoo:{name}; {near_misses(name, ZOO)}")


def load_zoo(name: str, *, dtype: torch.dtype | None = None, cache: bool | None = None) -> FxView:
    """The model ``zoo:name``; one that writes text has its key-value cache, unless ``cache`` is
    false.

    Raises ``BadInput`` for an unknown name and for a true ``cache`` of a model that writes no text,
    ``Missing`` without the model's package.
    """
    check_zoo(name)
    if cache is None:
        cache = name in WITH_CACHE
    if cache and name not in WITH_CACHE:
        raise BadInput(f"zoo:{name} does not generate text, so it has no cache to export")
    module, _, function = ZOO[name].partition(":")
    loader = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    view: FxView = loader(dtype, cache=True) if cache else loader(dtype)
    return view
