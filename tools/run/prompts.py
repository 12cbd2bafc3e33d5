"""What is asked of a model that writes: whether it does, and prompts as the texts that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...backends import Executable
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.chat_template import Message, chat_text
from ...ir.load.side_files import read_json
from ..evaluate.subject import READERS, Subject

Prompt = str | Sequence[Message]
"""A text, or the messages of a chat."""


def prompt_text(prompt: Prompt, chat: Path | None = None) -> str:
    """The text that a model continues: of a chat, what the template of that folder makes of it.

    Raises ``BadInput`` for what is no text, ``Missing`` where there is no template.
    """
    text = prompt
    if chat is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = chat_text(chat, messages, answer=True)
    if not isinstance(text, str):
        advice = " (messages need chat=True)" if isinstance(text, list) else ""
        raise BadInput(f"a prompt is of type {type(text).__name__}, and must be a text{advice}")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        raise BadInput(f"the prompt {text!r} is not UTF-8 text") from None
    return text


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
