"""Messages as a model reads them: its chat template, as ``apply_chat_template`` of transformers
renders it (sandboxed jinja; special tokens are the template's own)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import BadInput, Missing
from .side_files import named_token, read_json

Message = Mapping[str, Any]
"""``role`` and ``content``."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def chat_template(folder: str | Path | None) -> str | None:
    """The template of a model's folder: ``chat_template.jinja``, else what
    ``tokenizer_config.json`` holds, of several the one named ``default``."""
    path = Path(folder) / "chat_template.jinja" if folder else None
    if path is not None and path.is_file():
        return path.read_text(encoding="utf-8")
    held = read_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(held, list):
        named = {t.get("name"): t.get("template") for t in held if isinstance(t, dict)}
        held = named.get("default")
    return held if isinstance(held, str) else None


def chat_text(
    folder: str | Path | None, messages: Sequence[Message], *, answer: bool = False
) -> str:
    """The text of messages; with ``answer`` up to where the model's own answer begins.

    Raises ``Missing`` for a folder without a template, ``BadInput`` for one that fails on them.
    """
    template = chat_template(folder)
    if template is None:
        raise Missing(
            f"{folder or 'the model'}: messages are read by a chat template, and there is none: "
            "put chat_template.jinja beside the tokenizer, or give plain text"
        )
    special = {name: token for name in _SPECIAL if (token := named_token(folder, name))}
    try:
        text: str = _environment().from_string(template).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=answer,
            **special,
        )  # fmt: skip
    except Exception as error:
        # A template fails in jinja's words or in those of what it was given.
        raise BadInput(f"{folder}: its chat template fails on these messages: {error}") from None
    return text


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant said: here the text inside alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> None:
    raise ValueError(message)
