"""What a family of small models is, for the tables of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYERS = 2


@dataclass(frozen=True)
class Family:
    """One family: class, config class, sizes, and what a person sees in it."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    blocks: tuple[int, ...] = (LAYERS,)
    """Blocks of each stack in the order of the graph: those that one stream runs around. () where
    there is none, as in a UNet, whose streams skip to later layers, and where streams of text and
    of image look at each other (SD3, the first layers of Flux)."""
    sites: int | None = None
    """Attention sites, where not one a block: a decoder layer that looks at an encoder has two."""
    cache: bool = False
    """Whether it generates text by keys and values."""
    library: str = "transformers"


def causal(model: str, sizes: Mapping[str, Any], **facts: Any) -> Family:
    """A decoder whose config is named as its model is."""
    config = model.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Config"
    return Family(model, config, sizes, cache=True, **facts)
