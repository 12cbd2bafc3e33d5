"""Which words a head says, where it does not say all."""

from __future__ import annotations

import json
from collections.abc import Mapping

HEAD_KEY = "graphwright.head_tokens"
"""Metadata: JSON list, for each column of ``logits`` the id of its token; absent where a column's
number is its token's id."""

ATTENTION = "attention"
"""The output of a model that ranks by what a text's last tokens look at, in the place of
``logits``."""


def head_tokens(metadata: Mapping[str, str]) -> tuple[int, ...]:
    """The ids of the tokens that the columns of ``logits`` stand for; empty where they are 0, 1, 2
    and so on."""
    return tuple(map(int, json.loads(metadata.get(HEAD_KEY, "[]"))))
