"""A tokenizer's files as onnxruntime-genai reads them, in an artifact's folder.

It reads ``tokenizer.json`` of the types BPE and Unigram, by the class that
``tokenizer_config.json`` names: without a class it puts other tokens before a text, or fails. Which
classes it knows is of release 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ir.load.side_files import end_tokens, read_json

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"
CLASSES = frozenset({
    "PreTrainedTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer",
    "CodeLlamaTokenizer", "GemmaTokenizer", "Phi3Tokenizer", "CodeGenTokenizer", "CLIPTokenizer",
    "WhisperTokenizer", "ChatGLMTokenizer", "InternLM2Tokenizer", "BaichuanTokenizer",
    "GPTNeoXTokenizer", "T5Tokenizer", "MarianTokenizer", "DebertaV2Tokenizer",
    "XLMRobertaTokenizer", "TokenizersBackend", "PythonBackend", "MistralCommonBackend",
    "SentencePieceBackend",
})  # fmt: skip
"""Classes that it knows, each with ``Fast`` behind it or without."""
CLASSES_OF = {"BPE": GENERIC, "Unigram": "T5Tokenizer"}
"""One that reads a file of this type."""
_TOKENS = "onnxruntime-genai reads no words here, only tokens"
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def settle_words(folder: Path) -> list[str]:
    """Let the configuration of a folder's tokenizer say what the runtime asks for, where it does
    not; what a person should know of how it reads the rest. Raises ``BadInput`` as ``read_json``.
    """
    tokenizer, config = read_json(folder, FILE), read_json(folder, CONFIG)
    model, name = tokenizer.get("model"), config.get("tokenizer_class")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in CLASSES_OF:
        why = f"{FILE} is a {kind}, not a BPE or Unigram" if tokenizer else f"there is no {FILE}"
        return [f"{_TOKENS}: {why}"]
    lines = []
    if name is None and kind == "BPE":
        content = {**_ends(folder, tokenizer), **config, "tokenizer_class": GENERIC}
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        lines.append(
            f"{CONFIG} names a tokenizer_class now, {GENERIC}: onnxruntime-genai asks for one"
        )
    elif str(name).removesuffix("Fast") not in CLASSES:
        lines.append(
            f"{_TOKENS}: it does not know the tokenizer_class {name}. With {CLASSES_OF[kind]} in "
            f"{CONFIG} it reads {FILE}"
        )
    normalizers = sorted({*_types(tokenizer.get("normalizer"))} & _NORMALIZERS)
    if normalizers and kind == "BPE":
        lines.append(
            f"its tokenizer normalizes texts ({', '.join(normalizers)}), which onnxruntime-genai "
            "does not: it reads those that are normalized as the tokenizer does"
        )
    return lines


def _ends(folder: Path, tokenizer: dict[str, Any]) -> dict[str, str]:
    """The words that begin and end a text, by their ids in the model's configs."""
    added = [token for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict)]
    words = {token.get("id"): str(token.get("content")) for token in added}
    first = read_json(folder, "generation_config.json").get(
        "bos_token_id", read_json(folder, "config.json").get("bos_token_id")
    )
    ids = {"bos_token": first, "eos_token": min(end_tokens(folder), default=None)}
    return {name: words[i] for name, i in ids.items() if isinstance(i, int) and i in words}


def _types(normalizer: Any) -> Iterator[str]:
    if isinstance(normalizer, dict):
        yield str(normalizer.get("type"))
        for inner in normalizer.get("normalizers") or []:
            yield from _types(inner)
