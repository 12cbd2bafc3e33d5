"""Text for the language tasks: documents, windows over them, batches of windows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.core.errors import BadInput, Missing
from ..data.text import read_texts
from ..data.text_lines import FORM
from .subject import Subject
from .task import Setting, limited

DEFAULT_WINDOWS = 160
TOKENS_PER_BATCH = 4096
"""Of 32-bit logits over 8192 words this many take 134 MB."""


@dataclass(frozen=True)
class Window:
    """A stretch of text. The last ``scored`` tokens are predicted from those before them."""

    ids: tuple[int, ...]
    scored: int


def documents(setting: Setting, folder: str | Path | None = None) -> list[str]:
    """The texts of ``setting.data``, or the shipped test text.

    A file of JSON lines gives the text of each (``data.text_lines``; ``folder`` has the chat
    template), any other file is one document. Raises ``Missing`` for a file that is not there,
    ``BadInput`` for one that holds no text.
    """
    if setting.data is None:
        from ...ir.load.zoo.text import shipped_text

        return list(shipped_text("test"))
    path = setting.data
    if not path.is_file():
        raise Missing(f"{path}: no such file: --data takes plain text, or JSON lines with {FORM}")
    return read_texts(path, folder, (".jsonl", ".json"))


def check_text(subject: Subject, setting: Setting) -> None:
    """Raise early where the tokenizer or the text is not there."""
    subject.tokenizer_file()
    documents(setting, subject.folder)
    window_size(subject, setting)


def window_size(subject: Subject, setting: Setting) -> int:
    """Tokens in a window. ``BadInput`` where more are asked for than the model takes."""
    if setting.window is not None and setting.window > subject.max_tokens:
        raise BadInput(
            f"--window {setting.window} is more than the {subject.max_tokens} tokens that "
            f"{subject.name} takes"
        )
    return setting.window or min(512, subject.max_tokens)


def shuffled(setting: Setting, folder: str | Path | None = None) -> list[str]:
    """The documents in an order drawn by the seed."""
    texts = documents(setting, folder)
    random.Random(setting.seed).shuffle(texts)
    return texts


def chosen_windows(subject: Subject, setting: Setting) -> tuple[list[Window], list[str]]:
    """The windows to judge on, and notes.

    Shuffled documents stand one after another, each with what the tokenizer puts around a text, and
    windows slide over the whole: the convention of the papers. Taken one by one, short documents
    would be judged mostly on words that have little before them, which models are not trained on:
    tiny-llama's perplexity was 57.9 so and is 34.7 here, and noise in its weights lowered the
    former.
    """
    size = window_size(subject, setting)
    stride = setting.stride or max(1, size // 2)
    if stride > size:
        raise BadInput(f"--stride {stride} is more than the window of {size} tokens")
    tokenizer = subject.tokenizer()
    enough = size + (setting.samples or DEFAULT_WINDOWS) * stride
    ids: list[int] = []
    for text in shuffled(setting, subject.folder):
        ids += tokenizer.encode(text).ids
        if len(ids) >= enough:
            break
    parts = windows(ids, size, stride)
    if not parts:
        raise BadInput("the text holds no two tokens in a row: there is nothing to predict")
    count, notes = limited(len(parts), setting, DEFAULT_WINDOWS, "windows")
    return parts[:count], notes


def windows(ids: Sequence[int], size: int, stride: int) -> list[Window]:
    """Sliding windows in which every token but the first is predicted exactly once.

    The last one ends where the text ends and is as long as the others, so that no prediction
    but those of the first window has less than ``size - stride`` tokens before it.

    A stride of ``size`` is the convention of most papers on quantization (GPTQ's, arXiv
    2210.17323): windows side by side, each judged on its own, so that nothing predicts its first
    token, and what is left at the end is not judged.
    """
    if len(ids) < 2:
        return []
    if stride == size and len(ids) >= size:
        starts = range(0, len(ids) - size + 1, size)
        return [Window(tuple(ids[start : start + size]), size - 1) for start in starts]
    end = min(size, len(ids))
    parts = [Window(tuple(ids[:end]), end - 1)]
    while end < len(ids):
        last, end = end, min(end + stride, len(ids))
        parts.append(Window(tuple(ids[end - size : end]), end - last))
    return parts


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
