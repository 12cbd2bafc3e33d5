"""Text of unknown origin as it may be shown: what steers a terminal or a reader becomes visible."""

from __future__ import annotations

import re

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and new line, marks that turn the direction of writing, and halves of
pairs, which no encoding writes."""


def visible(text: str) -> str:
    """The text with the escape of each such character, ``\\x1b``, in its place."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
