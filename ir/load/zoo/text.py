"""English text that ships with the package, and text as batches of token ids."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from ...core.errors import BadInput, Missing

SHIPPED = Path(__file__).parent / "tiny-llama"


@cache
def shipped_text(split: Literal["calibration", "test"]) -> tuple[str, ...]:
    """Texts of the split that ``zoo:tiny-llama`` was not trained on, by ``tools/zoo/corpus.py``.

    English documentation of free software; each text holds the paragraphs of one page that fell
    to the split. Near-duplicates of other splits are left out.
    """
    with gzip.open(SHIPPED / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return tuple(json.loads(line)["text"] for line in file)


def english_sentences(count: int) -> list[str]:
    """``count`` sentences of Python's language reference, spread evenly over its topics.

    The text comes with the interpreter (``pydoc_data.topics``): the same for the same version of
    Python.
    """
    from pydoc_data.topics import topics

    unique: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            # Indented lines are code or grammar; rows of signs underline headings.
            if re.search(r"^( {3}|\*\*|==|--|\S* *::=)", paragraph, re.MULTILINE):
                continue
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                if re.fullmatch(r"[A-Z][^|<>{}]{39,299}[.!?]", sentence):
                    unique[sentence] = None
    sentences = list(unique)
    return sentences[:: max(1, len(sentences) // count)][:count]


def read_tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a model folder. ``Missing`` without file or package,
    ``BadInput`` for a file that it does not take, and later for a text that it cannot encode."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise Missing(f"{folder}: no tokenizer.json there, and the model's text needs one")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Missing("reading text needs tokenizers: pip install 'graphwright[hf]'") from None
    with _reading(path):
        return CheckedTokenizer(Tokenizer.from_file(str(path)), path)


class CheckedTokenizer:
    """A ``tokenizers.Tokenizer`` whose errors name its file: the library raises plain ``Exception``
    for what is wrong with a file, and a panic of its own kind where it did not expect it."""

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._tokenizer, name)
        if not callable(attribute):
            return attribute

        def called(*args: Any, **options: Any) -> Any:
            with _reading(self._path):
                return attribute(*args, **options)

        return called


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise BadInput(f"{path}: the tokenizer fails: {error}") from None
        raise


def token_batches(
    tokenizer: Any, texts: Sequence[str], *, batch: int, longest: int, left: bool = False
) -> list[dict[str, torch.Tensor]]:
    """``input_ids`` and ``attention_mask``, ``[batch, seq]`` i64: each batch as long as its longest
    text, cut to ``longest`` tokens. ``left`` pads before the text, as language models want it."""
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(direction="left" if left else "right")
    batches = []
    for start in range(0, len(texts), batch):
        encoded = tokenizer.encode_batch(list(texts[start : start + batch]))
        batches.append(
            {
                "input_ids": torch.tensor([e.ids for e in encoded]),
                "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            }
        )
    return batches
