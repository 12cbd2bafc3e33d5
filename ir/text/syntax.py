"""The words of the text form: names, literals, types, and the reader that takes a line apart."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..core.types import DTYPE_NAMES, DTYPES

_BARE = re.compile(r"[\w./\-]+(?::[\w./\-]+)*")
_NUMBER = re.compile(r"[+-]?(?:inf|nan|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORD = re.compile(r"[A-Za-z_]\w*")
_OP = re.compile(r"[\w.\-]+(?:::[\w.\-]+)*")

_TORCH_WORDS: dict[str, Any] = {
    str(word): word
    for word in (
        torch.strided, torch.sparse_coo, torch.contiguous_format, torch.preserve_format,
        torch.channels_last, torch.channels_last_3d,
    )
}  # fmt: skip
_CONSTANTS = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}


@dataclass(frozen=True, slots=True)
class Ref:
    """A value by name: ``%name``, or ``@name`` for a weight."""

    sigil: str
    name: str

    def __str__(self) -> str:
        bare = _BARE.fullmatch(self.name)
        return self.sigil + (self.name if bare else json.dumps(self.name))


@dataclass(frozen=True, slots=True)
class Proto:
    """Bytes of a serialized message, printed in base64."""

    data: bytes


def write_literal(value: Any, ref: Callable[[Any], Ref]) -> str:
    """A constant or a nest of constants and values; ``ref`` names what is neither.

    Raises ``ValueError`` for what the text form has no word for.
    """
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        items = [write_literal(v, ref) for v in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(write_literal(v, ref) for v in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value) or _no_word(value)
    if isinstance(value, torch.device):
        return f"device({json.dumps(str(value))})"
    if isinstance(value, torch.layout | torch.memory_format):
        known = str(value) in _TORCH_WORDS
        return f"torch({json.dumps(str(value))})" if known else _no_word(value)
    if isinstance(value, Proto):
        return f'proto("{base64.b64encode(value.data).decode()}")'
    return str(ref(value))


def _no_word(value: Any) -> str:
    raise ValueError(f"the text form has no word for {value!r} ({type(value).__name__})")


class Reader:
    """Takes one line apart from the left. Every method raises ``ValueError`` where it cannot."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self, piece: str) -> bool:
        self._space()
        return self.text.startswith(piece, self.at)

    def take(self, piece: str) -> bool:
        """Step over ``piece`` if it comes next."""
        present = self.peek(piece)
        self.at += len(piece) if present else 0
        return present

    def need(self, piece: str) -> None:
        if not self.take(piece):
            raise ValueError(f"expected {piece!r} before {self._rest()}")

    def end(self) -> None:
        self._space()
        if self.at < len(self.text):
            raise ValueError(f"nothing is expected after this point: {self._rest()}")

    def op(self) -> str:
        return self._match(_OP, "the name of an op")

    def word(self) -> str:
        return self._match(_WORD, "a word")

    def integer(self) -> int:
        number = self.literal()
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"expected a whole number, not {number!r}")
        return number

    def string(self) -> str:
        return str(json.loads(self._match(_STRING, "a string in double quotes")))

    def name(self) -> str:
        """A bare or a quoted name."""
        return self.string() if self.peek('"') else self._match(_BARE, "a name")

    def ref(self) -> Ref:
        sigil = "@" if self.peek("@") else "%"
        self.need(sigil)
        return Ref(sigil, self.name())

    def type_text(self) -> str:
        """Everything up to the bracket that closes the first one."""
        self._space()
        depth = 0
        for end in range(self.at, len(self.text)):
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(self.text[end], 0)
            if depth == 0 and self.text[end] in "])":
                piece, self.at = self.text[self.at : end + 1], end + 1
                return piece
        raise ValueError(f"expected a type such as f32[2, seq] before {self._rest()}")

    def literal(self) -> Any:
        """A constant, a ``Ref``, or a list or tuple of them."""
        if self.peek("%") or self.peek("@"):
            return self.ref()
        if self.peek('"'):
            return self.string()
        if self.take("["):
            return self._items("]")
        if self.take("("):
            return tuple(self._items(")"))
        number = _NUMBER.match(self.text, self.at)
        if number is not None:
            self.at = number.end()
            plain = number[0].lstrip("+-").isdigit()
            return int(number[0]) if plain else float(number[0])
        return self._named(self.word())

    def _items(self, close: str) -> list[Any]:
        items = []
        while not self.take(close):
            items.append(self.literal())
            if not self.peek(close):
                self.need(",")
        return items

    def _named(self, word: str) -> Any:
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if word in DTYPES:
            return DTYPES[word]
        if word not in ("device", "torch", "proto"):
            raise ValueError(f"{word!r} is not a constant, no dtype and no value (%name, @name)")
        self.need("(")
        text = self.string()
        self.need(")")
        if word == "proto":
            return Proto(base64.b64decode(text, validate=True))
        if word == "torch" and text not in _TORCH_WORDS:
            raise ValueError(f"{text!r} is not a format or layout: {', '.join(_TORCH_WORDS)}")
        try:
            return torch.device(text) if word == "device" else _TORCH_WORDS[text]
        except RuntimeError:
            raise ValueError(f"{text!r} is not a device") from None

    def attrs(self) -> dict[str, Any]:
        """``{name = value, ...}``, or nothing."""
        attrs: dict[str, Any] = {}
        if not self.take("{"):
            return attrs
        while not self.take("}"):
            key = self.word()
            self.need("=")
            if key in attrs:
                raise ValueError(f"the attribute {key} is given twice")
            attrs[key] = self.literal()
            if not self.peek("}"):
                self.need(",")
        return attrs

    def operands(self) -> tuple[Any, ...]:
        self.need("(")
        return tuple(self._items(")"))

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._space()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise ValueError(f"expected {what} before {self._rest()}")
        self.at = match.end()
        return match[0]

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def _rest(self) -> str:
        rest = self.text[self.at :]
        return repr(rest[:40]) if rest else "the end of the line"
