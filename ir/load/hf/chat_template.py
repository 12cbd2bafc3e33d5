"""Messages as a model reads them: its chat template, rendered by transformers' own
``apply_chat_template``, from the template and the special tokens that a folder's files name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import BadInput, Missing
from ..side_files import read_json

Message = Mapping[str, Any]
"""``role`` and ``content``."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
            "mask_token")  # fmt: skip
_FILE, _MORE = "chat_template.jinja", "additional_chat_templates"


def chat_templates(folder: str | Path | None) -> dict[str, str]:
    """The templates of a model's folder by name: ``chat_template.jinja`` is the one named
    ``default``, those of ``additional_chat_templates`` have the names of their files; else what
    ``tokenizer_config.json`` holds."""
    if not folder:
        return {}
    files = {path.stem: path for path in sorted((Path(folder) / _MORE).glob("*.jinja"))}
    if (Path(folder) / _FILE).is_file():
        files["default"] = Path(folder) / _FILE
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    held = read_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(held, str):
        return {"default": held}
    listed = [one for one in held if isinstance(one, dict)] if isinstance(held, list) else []
    named = {one.get("name"): one.get("template") for one in listed}
    return {n: t for n, t in named.items() if isinstance(n, str) and isinstance(t, str)}


def chat_text(
    folder: str | Path | None, messages: Sequence[Message], *, answer: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None, settings: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The text of messages; with ``answer`` up to where the model's own answer begins.

    ``tools`` are JSON schemas of what it may call, for which a template named ``tool_use`` goes
    before the others; ``settings`` what else a template asks for (``enable_thinking``). Raises
    ``Missing`` for a folder without a template, or where transformers is not installed,
    ``BadInput`` for a template that fails on them.
    """
    templates = chat_templates(folder)
    if "default" not in templates and not (tools and "tool_use" in templates):
        raise Missing(
            f"{folder or 'the model'}: messages are read by a chat template, and there is none: "
            "put chat_template.jinja beside the tokenizer, or give plain text"
        )
    try:
        from transformers import PreTrainedTokenizerBase
    except ImportError as error:
        advice = "pip install 'graphwright[hf]'"
        raise Missing(f"chat templates need transformers: {advice} ({error})") from None
    renderer: Any = PreTrainedTokenizerBase(chat_template=templates)
    try:
        text: str = renderer.apply_chat_template(
            [dict(message) for message in messages], tools=list(tools) if tools else None,
            add_generation_prompt=answer, tokenize=False,
            **{**_special_tokens(folder), **(settings or {})},
        )  # fmt: skip
    except Exception as error:
        # A template fails in jinja's words or in those of what it was given.
        raise BadInput(f"{folder}: its chat template fails on these messages: {error}") from None
    return text


def _special_tokens(folder: str | Path | None) -> dict[str, str]:
    """The tokens that a template may name, as the tokenizer's files have them."""
    config = read_json(folder, "tokenizer_config.json")
    own = config.get("model_specific_special_tokens")
    held = read_json(folder, "special_tokens_map.json") | config
    named = {name: held.get(name) for name in _SPECIAL} | (own if isinstance(own, dict) else {})
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
