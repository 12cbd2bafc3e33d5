"""The text of a recipe as it is written: names of passes, and of each its options.

What ``recipe`` makes passes of; it says here how a text is read. Nothing heavy is imported, so that
a mistake in a name can be told at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..ir.core.errors import BadInput, near_misses

Options = list[tuple[str, Any]]
"""Names as they are written, with a text, or the texts of a list."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s{}\[\]=,"]+|[{}\[\]=,]')
ALIASES = {"group_size": "group", "block_size": "group", "ignore": "exclude"}
"""What other tools call an option."""


def option_of(name: str, written: str, known: Sequence[str]) -> str:
    """The option of a pass that a recipe names. Raises ``BadInput`` with near misses."""
    option = written if written in known else ALIASES.get(written, written)
    if option not in known:
        raise BadInput(f"{name} has no option {written!r}; {near_misses(option, known)}")
    return option


def read(text: str) -> Iterator[tuple[str, Options]]:
    """Passes in order. Raises ``BadInput`` on bad syntax."""
    tokens = _tokens(text)
    position = 0
    while True:
        name, position = _word(tokens, position, "the name of a pass", text)
        options: Options = []
        if position < len(tokens) and tokens[position] == "{":
            options, position = _options(tokens, position + 1, text)
        yield name, options
        if position == len(tokens):
            return
        if tokens[position] != ",":
            raise BadInput(f"recipe {text!r}: expected ',' before {tokens[position]!r}")
        position += 1


def _tokens(text: str) -> list[str]:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s+", "", text) and '"' not in text:
        raise BadInput(f"recipe {text!r}: cannot be read")
    if text.count('"') % 2 and '\\"' not in text:
        raise BadInput(f"recipe {text!r}: a quote is not closed")
    return tokens


def _word(tokens: Sequence[str], position: int, what: str, text: str) -> tuple[str, int]:
    if position >= len(tokens) or tokens[position] in "{}[]=,":
        token = tokens[position] if position < len(tokens) else "the end"
        raise BadInput(f"recipe {text!r}: expected {what}, got {token!r}")
    word = tokens[position]
    if word.startswith('"'):
        word = re.sub(r"\\(.)", r"\1", word[1:-1])
    return word, position + 1


def _options(tokens: Sequence[str], position: int, text: str) -> tuple[Options, int]:
    options: Options = []
    while position < len(tokens) and tokens[position] != "}":
        name, position = _word(tokens, position, "an option or '}'", text)
        if position >= len(tokens) or tokens[position] != "=":
            raise BadInput(f"recipe {text!r}: the option {name} needs '=' and a value")
        position += 1
        value: Any
        if position < len(tokens) and tokens[position] == "[":
            items = []
            position += 1
            while position < len(tokens) and tokens[position] != "]":
                item, position = _word(tokens, position, "a value or ']'", text)
                items.append(item)
            value, position = tuple(items), position + 1
        else:
            value, position = _word(tokens, position, f"a value for {name}", text)
            while position < len(tokens) and tokens[position] == ",":
                more, position = _word(tokens, position + 1, f"a value for {name}", text)
                if tokens[position : position + 1] == ["="]:
                    raise BadInput(
                        f"recipe {text!r}: options are separated by a space, not by a comma: "
                        f"{name}={value} {more}=..."
                    )
                value = f"{value},{more}"
        options.append((name, value))
    if position >= len(tokens):
        raise BadInput(f"recipe {text!r}: '}}' is missing")
    return options, position + 1
