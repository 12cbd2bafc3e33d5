"""What is asked of a model that writes: whether it does, and prompts as the texts that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...backends import Executable
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.chat_template import Message, chat_text
from ...ir.load.side_files import read_json
from ..evaluate.subject import READERS, Subject

Prompt = str | Sequence[Message]
"""A text, or the messages of a chat."""


def as_prompts(given: str | Sequence[Prompt] | Sequence[Message]) -> list[Prompt]:
    """Several prompts, or one: a text, or the messages of one chat."""
    prompts: Any = given
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and all(isinstance(p, Mapping) for p in prompts) else prompts


def prompt_text(prompt: Prompt, chat: Path | None = None) -> str:
    """The text that a model continues: of a chat, what the template of that folder makes of it.

    Raises ``BadInput`` for what is no text, ``Missing`` where there is no template.
    """
    text = prompt
    if chat is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = chat_text(chat, _checked(messages), answer=True)
    if not isinstance(text, str):
        advice = " (messages need chat=True)" if isinstance(text, list | Mapping) else ""
        raise BadInput(f"a prompt is of type {type(text).__name__}, and must be a text{advice}")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        raise BadInput(f"the prompt {text!r} is not UTF-8 text") from None
    return text


def _checked(messages: Any) -> Sequence[Message]:
    """Messages that a template reads in full: of others it writes nothing, in silence."""
    fit = isinstance(messages, list | tuple) and all(
        isinstance(message, Mapping) and "role" in message
        and ("content" in message or "tool_calls" in message) for message in messages
    )
    if not fit or not messages:
        raise BadInput(
            f"a chat is a text of the user's or a list of messages, each a dict with role and "
            f"content, and this is {messages!r}"
        )
    return list(messages)


def check_writes(graph: View, run: Executable, folder: Path) -> None:
    """Of a graph without a cache: raise ``BadInput`` for logits that are no next token, but classes
    of a text or of its tokens, or the words that a masked model sees in one."""
    subject = Subject(run, name=graph.source.name, view=graph, folder=folder,
                      kind=graph.source.task)  # fmt: skip
    classes = "".join(map(str, read_json(folder, "config.json").get("architectures") or ()))
    if subject.kind in READERS and "Generation" not in classes:
        raise BadInput(
            f"{subject.name or folder} ({classes or subject.kind}) writes no text: its logits are "
            "of the text that it reads, not of the token behind it"
        )
