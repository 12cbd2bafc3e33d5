"""Text for the language tasks: documents, windows over them, batches of windows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import BadInput, Missing
from ..calibration_text import read_content, read_lines
from .subject import Subject
from .task import Setting, limited

DEFAULT_WINDOWS = 320
TOKENS_PER_BATCH = 4096
"""Of 32-bit logits over 8192 words this many take 134 MB."""
FEW_DOCUMENTS = 8
"""Below it a bootstrap over documents says little, and windows are the unit."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document. The last ``scored`` tokens are predicted from those before them."""

    document: int
    ids: tuple[int, ...]
    scored: int


def documents(setting: Setting) -> list[str]:
    """The texts of ``setting.data``, or the shipped test text.

    A file of JSON lines gives the field ``text`` of each, any other file is one document. Raises
    ``Missing`` for a file that is not there, ``BadInput`` for one that holds no text.
    """
    if setting.data is None:
        from ...ir.zoo.text import shipped_text

        return list(shipped_text("test"))
    path = setting.data
    if not path.is_file():
        raise Missing(f"{path}: no such file: --data takes plain text, or JSON lines with `text`")
    if path.suffix in (".jsonl", ".json"):
        found = [entry["text"] for entry in read_lines(path, ("text",))]
    else:
        found = [read_content(path)]
    found = [text for text in found if text.strip()]
    if not found:
        raise BadInput(f"{path}: holds no text")
    return found


def check_text(subject: Subject, setting: Setting) -> None:
    """Raise early where the tokenizer or the text is not there."""
    subject.tokenizer_file()
    documents(setting)
    window_size(subject, setting)


def window_size(subject: Subject, setting: Setting) -> int:
    """Tokens in a window. ``BadInput`` where more are asked for than the model takes."""
    if setting.window is not None and setting.window > subject.max_tokens:
        raise BadInput(
            f"--window {setting.window} is more than the {subject.max_tokens} tokens that "
            f"{subject.name} takes"
        )
    return setting.window or min(512, subject.max_tokens)


def chosen_windows(
    subject: Subject, setting: Setting, default: int = DEFAULT_WINDOWS
) -> tuple[list[Window], list[str], list[str]]:
    """The windows to judge on, the documents they come from, and notes.

    Documents are taken whole, in an order shuffled by the seed, until there are enough windows.
    """
    texts = documents(setting)
    size = window_size(subject, setting)
    stride = setting.stride or max(1, size // 2)
    if stride > size:
        raise BadInput(f"--stride {stride} is more than the window of {size} tokens")
    tokenizer = subject.tokenizer()
    order = list(range(len(texts)))
    random.Random(setting.seed).shuffle(order)
    found: list[Window] = []
    wanted = setting.samples or default
    for document in order:
        if len(found) >= wanted:
            break
        found += windows(document, tokenizer.encode(texts[document]).ids, size, stride)
    if not found:
        raise BadInput("the text holds no two tokens in a row: there is nothing to predict")
    count, notes = limited(len(found), setting, default, "windows")
    return found[:count], texts, notes


def windows(document: int, ids: Sequence[int], size: int, stride: int) -> list[Window]:
    """Sliding windows in which every token but the first is predicted exactly once.

    The last one ends where the document ends and is as long as the others, so that no prediction
    but those of the first window has less than ``size - stride`` tokens before it.
    """
    if len(ids) < 2:
        return []
    end = min(size, len(ids))
    found = [Window(document, tuple(ids[:end]), end - 1)]
    while end < len(ids):
        last, end = end, min(end + stride, len(ids))
        found.append(Window(document, tuple(ids[end - size : end]), end - last))
    return found


def batched(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(positions in ``sequences``, inputs) of batches of like length, longest first.

    Rows are padded on the right under the mask: a causal model's outputs at real tokens depend on
    nothing to the right, and no position id moves, as it would with padding on the left.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        rows = order[start : start + max(1, TOKENS_PER_BATCH // longest)]
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            ids[row, : len(sequences[index])] = torch.tensor(list(sequences[index]))
            mask[row, : len(sequences[index])] = 1
        yield rows, {"input_ids": ids, "attention_mask": mask}
        start += len(rows)


def text_logits(subject: Subject, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[batch, seq, vocab]`` f32 of every token. ``BadInput`` where there are fewer."""
    logits = subject.run(inputs)["logits"]
    ids = inputs["input_ids"]
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise BadInput(
            f"{subject.name} gives logits {list(logits.shape)} for tokens {list(ids.shape)}: this "
            "task needs one prediction for each token"
        )
    if int(ids.max()) >= logits.shape[-1]:
        raise BadInput(
            f"{subject.name} knows {logits.shape[-1]} tokens and its tokenizer gives token "
            f"{int(ids.max())}: the tokenizer is another model's"
        )
    return logits


def units(windows: Sequence[Window]) -> tuple[str, list[int]]:
    """What the bootstrap draws, and the unit of each window: documents, or windows if few."""
    numbers = {d: i for i, d in enumerate(dict.fromkeys(w.document for w in windows))}
    if len(numbers) >= FEW_DOCUMENTS:
        return "documents", [numbers[w.document] for w in windows]
    return "windows", list(range(len(windows)))
