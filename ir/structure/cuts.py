"""What a graph says of the cuts at which image tokens leave its text: how many stay, by which pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..core.errors import Refusal
from ..core.view import Value, View

COUNT_KEY, METHOD_KEY = "graphwright.image_tokens", "graphwright.image_token_methods"
"""Metadata: JSON of how many image tokens a row are left by the kept positions of each name, and of
the pass that kept them."""
REMADE_KEY = "graphwright.image_tokens_remade"
"""Metadata: JSON of whether what is left are tokens that no one patch stands for."""


def tokens_left(view: View, kept: Sequence[Value], tokens: int) -> int:
    """Of ``tokens`` of an image those that are left behind all cuts ``kept``. Raises ``Refusal``
    for one that no token pass made."""
    counts = _noted(view, COUNT_KEY)
    for value in kept:
        if view.name(value) not in counts:
            raise Refusal("tokens were selected here before, by something else than a token pass")
        tokens = counts[view.name(value)]
    return tokens


def note_cut(view: View, kept: Value, count: int, method: str, *, remade: bool = False) -> None:
    """Remember in the graph's metadata how many image tokens a cut leaves, which pass cut, and
    whether the text reads tokens there that are ``remade`` of several patches."""
    entries = {COUNT_KEY: count, METHOD_KEY: method} | ({REMADE_KEY: True} if remade else {})
    for key, entry in entries.items():
        view.metadata()[key] = json.dumps(_noted(view, key) | {view.name(kept): entry})


def cutting_pass(view: View, kept: Value) -> str:
    """The pass that made a cut; empty in graphs that say nothing of it."""
    return str(_noted(view, METHOD_KEY).get(view.name(kept), ""))


def is_remade(view: View, kept: Value) -> bool:
    """Whether no one patch stands for a token behind a cut."""
    return bool(_noted(view, REMADE_KEY).get(view.name(kept), False))


def _noted(view: View, key: str) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(view.metadata().get(key, "{}"))
    return entries
