"""Text of JSON lines: the forms in which people keep it to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ir.core.errors import BadInput
from ...ir.load.chat_template import Message, chat_text
from ...ir.load.side_files import named_token
from ...ir.load.zoo.text import read_tokenizer

FORM = "`text`, `prompt` with `completion`, or `messages` (role and content)"
_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles, which stand under ``from``; what was said under ``value``."""


def text_of(line: Mapping[str, Any], where: str, folder: str | Path | None) -> str:
    """The text of one line.

    ``messages`` become what the chat template of ``folder`` makes of them. Raises ``BadInput`` for
    a line of another form, ``Missing`` for messages without a template.
    """
    if isinstance(line.get("text"), str):
        return str(line["text"])
    parts = [line.get(key) for key in ("prompt", "completion")]
    if all(isinstance(part, str) for part in parts):
        return "".join(map(str, parts))
    said = next((line[key] for key in ("messages", "conversations") if key in line), None)
    if said is None and all(isinstance(part, list) for part in parts):
        said = [*(line["prompt"]), *(line["completion"])]
    if said is None:
        held = ", ".join(map(str, list(line)[:6])) or "nothing"
        raise BadInput(f"{where}: has no string `text`: it holds {held}, and a line takes {FORM}")
    return _without_begin(chat_text(folder, _messages(said, where)), folder)


def _messages(said: Any, where: str) -> Sequence[Message]:
    messages = [_message(one) for one in said] if isinstance(said, list) else []
    if not messages or not all("role" in m and "content" in m for m in messages):
        raise BadInput(f"{where}: its messages are no list of objects with `role` and `content`")
    return messages


def _message(one: Any) -> Message:
    if not isinstance(one, dict):
        return {}
    if "from" in one and "value" in one:
        return {"role": _SPEAKERS.get(one["from"], one["from"]), "content": one["value"]}
    return one


def _without_begin(text: str, folder: str | Path | None) -> str:
    """The text without the token that begins it, where the tokenizer puts one there too."""
    begin = named_token(folder, "bos_token")
    if folder is None or not begin or not text.startswith(begin):
        return text
    tokenizer = read_tokenizer(Path(folder))
    added = tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(begin)]
    return text.removeprefix(begin) if added else text
