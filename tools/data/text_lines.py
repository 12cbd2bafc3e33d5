"""Text of JSON lines: the forms in which people keep it to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ir.core.errors import BadInput
from ...ir.load.hf.chat_template import Message, chat_text
from ...ir.load.side_files import named_token
from ...ir.load.zoo.text import read_tokenizer

Text = str | tuple[str, str]
"""A text, or two that are read as a pair."""
PAIRS = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("question", "context"), ("question", "passage"),
    ("question1", "question2"), ("#1 String", "#2 String"), ("query", "document"),
    ("query", "passage"),
)  # fmt: skip
"""What two texts that are read as a pair are called: here, in GLUE's files, in SQuAD's and in MS
MARCO's."""
WHOLE = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
"""What says all that a line holds, whatever stands beside it."""
FORM = "`text`, `prompt` with `completion`, or `messages` (role and content)"
_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles, which stand under ``from``; what was said under ``value``."""


def sample_of(line: Mapping[str, Any], where: str, folder: str | Path | None) -> Text:
    """The text of one line, or the two of a pair. Raises as ``text_of``."""
    whole = any(all(line.get(key) is not None for key in keys) for keys in WHOLE)
    for first, second in PAIRS[:1] if whole else PAIRS:
        if isinstance(line.get(first), str) and isinstance(line.get(second), str):
            return str(line[first]), str(line[second])
    return text_of(line, where, folder)


def text_of(line: Mapping[str, Any], where: str, folder: str | Path | None) -> str:
    """The text of one line.

    ``messages`` become what the chat template of ``folder`` makes of them, with the ``tools`` and
    the ``chat_template_kwargs`` of the line. Raises ``BadInput`` for
    a line of another form, ``Missing`` for messages without a template.
    """
    alone = next((line[key] for key in ("text", "sentence") if key in line), None)
    if isinstance(alone, str):
        return alone
    parts = [line.get(key) for key in ("prompt", "completion")]
    if all(isinstance(part, str) for part in parts):
        return "".join(map(str, parts))
    said = next((line[key] for key in ("messages", "conversations") if key in line), None)
    if said is None and all(isinstance(part, list) for part in parts):
        said = [*(line["prompt"]), *(line["completion"])]
    if said is None:
        held = ", ".join(map(str, list(line)[:6])) or "nothing"
        raise BadInput(f"{where}: has no string `text`: it holds {held}, and a line takes {FORM}")
    tools, more = line.get("tools"), line.get("chat_template_kwargs")
    text = chat_text(
        folder, _messages(said, where), tools=tools if isinstance(tools, list) else None,
        settings=more if isinstance(more, dict) else None,
    )  # fmt: skip
    return _without_begin(text, folder)


def read_content(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises ``BadInput`` where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from None


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
