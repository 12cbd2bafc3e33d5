"""What is asked of a model that writes: whether it does, and prompts as the texts that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.hf.chat_template import Message, chat_text
from ...ir.load.side_files import read_json
from ...ir.structure.cache_slots import TOKEN_TYPES
from ..evaluate.subject import READERS, Subject

SEES_BEHIND = 0.02
"""Exact graphs from left to right have 0, XLNet and XLM of random weights 0.14 and 0.11."""
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
    of a text or of its tokens, or the words that a masked model sees in one; and for those that
    look at what is behind a token, as XLNet's and XLM's do, whose library writes by a mask at the
    end of the text."""
    subject = Subject(run, name=graph.source.name, view=graph, folder=folder,
                      kind=graph.source.task)  # fmt: skip
    classes = "".join(map(str, read_json(folder, "config.json").get("architectures") or ()))
    if subject.kind in READERS and "Generation" not in classes:
        raise BadInput(
            f"{subject.name or folder} ({classes or subject.kind}) writes no text: its logits are "
            "of the text that it reads, not of the token behind it"
        )
    apart = _apart_by_the_last(graph, subject)
    if apart > SEES_BEHIND:
        raise BadInput(
            f"{subject.name or folder} ({classes or subject.kind}) writes no text from left to "
            f"right: the logits of a token change by {apart:.1%} with what stands behind it"
        )


def _apart_by_the_last(graph: View, subject: Subject) -> float:
    """How far the logits of the other tokens move with the last one, of all that they are; 0 of a
    graph that takes other things than texts of any length."""
    types = graph.input_types()
    ids = types.get("input_ids")
    open_ = ids is not None and all(isinstance(dim, str) for dim in ids.shape or (1,))
    if not open_ or set(types) - {"input_ids", "attention_mask", TOKEN_TYPES}:
        return 0.0
    texts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    feeds = ({"input_ids": text[None], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
             for text in texts)  # fmt: skip
    one, other = (subject.run(feed)["logits"].float() for feed in feeds)
    if one.shape[1] != texts.shape[1]:
        return 0.0
    return float((one - other)[:, :-1].norm() / one[:, :-1].norm().clamp(min=1e-9))
