"""``tokenizer.json``: words looked up in it, and the file trimmed to some of its tokens."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ir.core.errors import BadInput, Missing

FILE = "tokenizer.json"
_ID = "_token_id"


def read_tokenizer(folder: Path, asked_by: str) -> tuple[Any, dict[str, Any]]:
    """The ``tokenizers.Tokenizer`` of a folder, and its file's content. Raises ``Missing`` without
    the file or the package, ``BadInput`` for a file that is none."""
    path = folder / FILE
    if not path.is_file():
        raise Missing(f"{asked_by}: {path} is not there, and it says which token is which word")
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise Missing(f"{asked_by} needs tokenizers: pip install 'graphwright[hf]'") from None
    text = path.read_text(encoding="utf-8")
    try:
        return library.Tokenizer.from_str(text), json.loads(text)
    except Exception as error:  # the library raises nothing else for any file
        raise BadInput(f"{path}: the tokenizer fails: {error}") from None


def read_text(text: str, asked_by: str) -> str:
    """What a file of a person's holds, in UTF-8. Raises ``BadInput`` where there is none."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise BadInput(f"{asked_by}: text={text}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{asked_by}: text={text}: not UTF-8: {error}") from None


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, whole, with the special ones that the tokenizer adds."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def token_ids(folder: Path, words: Sequence[str], asked_by: str) -> dict[str, int]:
    """The id of each word: of the token written so, or of the only token that it is read as."""
    tokenizer, _ = read_tokenizer(folder, asked_by)
    ids: dict[str, int] = {}
    for word in words:
        known = tokenizer.token_to_id(word)
        spelled = [] if known is not None else tokenizer.encode(word, add_special_tokens=False).ids
        if known is None and len(spelled) != 1:
            raise BadInput(
                f"{asked_by}: {word!r} is {len(spelled)} tokens ({', '.join(map(str, spelled))}); "
                "name single tokens, or ids"
            )
        ids[word] = spelled[0] if known is None else known
    return ids


def listed_ids(folder: Path, words: Sequence[str], asked_by: str) -> list[int]:
    """The ids that a list names: ids, runs of them (``3-7``), words of the tokenizer."""
    spelled = [word for word in words if not re.fullmatch(r"\d+(-\d+)?", word)]
    known = token_ids(folder, spelled, asked_by) if spelled else {}
    ids: list[int] = []
    for word in words:
        first, _, last = word.partition("-")
        ids += [known[word]] if word in known else range(int(first), int(last or first) + 1)
    return ids


def closed(content: Mapping[str, Any], ids: Collection[int]) -> list[int]:
    """These tokens and those that they are put together from, the file's special ones, and what any
    text can be spelled in (letters, bytes), ascending.

    So a text of these tokens is read as before: of pairs (BPE), each merge on the way to one of
    them is staying; of scored and of longest pieces the best stay the best among fewer.
    """
    model = content["model"]
    entries = _entries(model)
    staying = set(ids) | {int(t["id"]) for t in content.get("added_tokens") or ()}
    staying |= {i for piece, i in entries.items() if len(piece) == 1 or _is_byte(piece)}
    staying |= {i for i in [entries.get(str(model.get("unk_token"))), model.get("unk_id")]
             if i is not None}  # fmt: skip
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    staying |= {i for piece, i in entries.items()
             if len(piece.removeprefix(prefix).removesuffix(suffix)) == 1}  # fmt: skip
    parts: dict[int, list[int]] = {}
    for left, right in _merges(model):
        whole = entries.get(left + right.removeprefix(prefix))
        if whole is not None:
            parts.setdefault(whole, []).extend(entries[p] for p in (left, right) if p in entries)
    queue = list(staying)
    while queue:
        fresh = [part for part in parts.get(queue.pop(), ()) if part not in staying]
        staying.update(fresh)
        queue += fresh
    return sorted(staying)


def trimmed(content: dict[str, Any], staying: Sequence[int]) -> dict[str, Any]:
    """The file with these tokens alone, numbered anew in this order."""
    new = {old: place for place, old in enumerate(staying)}
    model = dict(content["model"])
    entries = {piece: new[i] for piece, i in _entries(model).items() if i in new}
    if isinstance(model.get("vocab"), list):  # pieces with scores, in the order of their ids
        scores = model["vocab"]
        model["vocab"] = [scores[old] for old in staying if old < len(scores)]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = entries
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            entry for entry, (left, right) in zip(model["merges"], _merges(model), strict=True)
            if left in entries and right in entries and left + right.removeprefix(prefix) in entries
        ]  # fmt: skip
    added = [{**t, "id": new[t["id"]]} for t in content.get("added_tokens") or ()]
    padding = content.get("padding")
    return {
        **content, "model": model, "added_tokens": added,
        "post_processor": _renumbered(content.get("post_processor"), new),
        "padding": padding and {**padding, "pad_id": new.get(padding["pad_id"], 0)},
    }  # fmt: skip


def renumbered_config(config: Any, new: Mapping[int, int], rows: int) -> Any:
    """A model's config, or a part of one, with the new ids of its special tokens."""
    if not isinstance(config, dict):
        return config
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size":
            changed[key] = rows
        elif key.endswith(_ID) and isinstance(value, int | list):
            ids = value if isinstance(value, list) else [value]
            mapped = [new[i] for i in ids if i in new]
            changed[key] = mapped if isinstance(value, list) else next(iter(mapped), None)
        elif key == "added_tokens_decoder":
            changed[key] = {str(new[int(i)]): t for i, t in value.items() if int(i) in new}
        else:
            changed[key] = renumbered_config(value, new, rows)
    return changed


def special_ids(config: Any) -> set[int]:
    """The ids that a config names."""
    if not isinstance(config, dict):
        return set()
    ids: set[int] = set()
    for key, value in config.items():
        named = value if isinstance(value, list) else [value]
        if key.endswith(_ID):
            ids |= {i for i in named if isinstance(i, int) and i >= 0}
        ids |= special_ids(value)
    return ids


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """What puts special tokens around a text: ids stand in ``ids``, and in pairs of a token and its
    id."""
    if isinstance(processor, list):
        pair = len(processor) == 2 and isinstance(processor[0], str)
        if pair and isinstance(processor[1], int):
            return [processor[0], new[processor[1]]]
        return [_renumbered(entry, new) for entry in processor]
    if not isinstance(processor, dict):
        return processor
    return {
        key: [new[i] for i in value] if key == "ids" else _renumbered(value, new)
        for key, value in processor.items()
    }


def _entries(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {piece: place for place, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or ())
    return [(left, right) for left, right in pairs]


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
