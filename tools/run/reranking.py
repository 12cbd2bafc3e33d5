"""Documents in the order in which they answer a query, by what a language model looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.core.errors import BadInput
from ...ir.load.side_files import longest_text
from ...ir.load.zoo.text import read_tokenizer
from ...ir.structure.cache_slots import present_of
from ...ir.structure.words import ATTENTION
from ..data.text import read_lines
from ..data.text_lines import read_content

DOCUMENT = "[{number}] {document}\n\n"
QUESTION = "Which of these paragraphs answer the question?\n\nQuestion:"
NO_CONTENT = "N/A"
"""The query whose attention is taken off: what documents receive whatever is asked."""
OUTLIER = 2.0
"""Tokens of so many standard deviations below the mean do not count."""


@dataclass(frozen=True)
class Ranked:
    """A document by its place in the list that was given."""

    place: int
    score: float


def read_documents(path: Path) -> list[str]:
    """The documents of a file: one a line, or the ``text`` of each line of a ``.jsonl``.

    Raises ``BadInput`` where there is none, and for a file that is not UTF-8.
    """
    if path.suffix == ".jsonl":
        documents = [str(line["text"]) for line in read_lines(path, ("text",))]
    else:
        documents = read_content(path).split("\n")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BadInput(f"{path}: empty: it holds no document")
    return documents


class Reranker:
    """An artifact of the pass ``rerank-by-attention`` with its tokenizer.

    In-context re-ranking (arXiv 2410.02642). Of a document's tokens the score is what the query's
    tokens pay to them on average, less what those of ``N/A`` do; tokens whose score lies more than
    two standard deviations below the mean of all are left out, and a document's is the sum of its
    tokens'. With a cache the documents are read once, and both queries behind them; each reads the
    whole prompt without one.
    """

    def __init__(self, model: Executable | str | Path, tokenizer: str | Path | None = None) -> None:
        """Raises ``BadInput`` for a model that gives no ``attention``."""
        folder = tokenizer or (model if isinstance(model, str | Path) else None)
        if folder is None:
            raise BadInput("give tokenizer=FOLDER: the model's folder is not known")
        self._run = compile_model(model) if isinstance(model, str | Path) else model
        if ATTENTION not in self._run.output_names:
            raise BadInput(
                f"the model gives {', '.join(self._run.output_names[:3])} and no {ATTENTION}: make "
                "the artifact with the pass rerank-by-attention"
            )
        self._pasts = [name for name in self._run.input_names
                       if present_of(name) in self._run.output_names]  # fmt: skip
        self._tokenizer: Any = read_tokenizer(Path(folder))
        self._longest = longest_text(folder)

    def __call__(self, query: str, documents: Sequence[str]) -> list[Ranked]:
        """The documents, the best first. Raises ``BadInput`` where there are none, the query is
        empty, and where they are longer together than the model's context."""
        text, owners = self._joined(documents)
        question, asked = self._ids(QUESTION), self._ids(f" {query.strip()}")
        if not query.strip():
            raise BadInput("the query is empty")
        read = self._read(text)
        calls = [(question + ids, len(ids)) for ids in (asked, self._ids(f" {NO_CONTENT}"))]
        paid, unasked = (self._paid(text, read, *call)[: len(text)] for call in calls)
        scores = paid - unasked
        inside = owners >= 0
        floor = scores[inside].mean() - OUTLIER * scores[inside].std()
        counting = inside & (scores >= floor)
        sums = torch.zeros(len(documents)).index_add(0, owners[counting], scores[counting])
        order = sums.argsort(descending=True, stable=True).tolist()
        return [Ranked(place, float(sums[place])) for place in order]

    def _joined(self, documents: Sequence[str]) -> tuple[list[int], torch.Tensor]:
        """The documents' prompt as ids, and of each token the document that it is of, or -1."""
        if not documents or not all(document.strip() for document in documents):
            raise BadInput("a document is empty" if documents else "there are no documents")
        ids: list[int] = self._tokenizer.encode("").ids
        owners = [-1] * len(ids)
        for place, document in enumerate(documents):
            piece = self._ids(DOCUMENT.format(number=place + 1, document=document.strip()))
            ids += piece
            owners += [place] * len(piece)
        return ids, torch.tensor(owners)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _read(self, text: Sequence[int]) -> dict[str, torch.Tensor]:
        """The cache behind the documents; empty where the model has none."""
        if not self._pasts:
            return {}
        ids = torch.tensor([text])
        outputs = self._run(input_ids=ids, attention_mask=torch.ones_like(ids))
        return {name: outputs[present_of(name)] for name in self._pasts}

    def _paid(
        self, text: Sequence[int], read: dict[str, torch.Tensor], behind: Sequence[int], count: int
    ) -> torch.Tensor:  # fmt: skip
        """What the last ``count`` tokens behind the documents pay to each token on average."""
        length = len(text) + len(behind)
        if self._longest is not None and length > self._longest:
            raise BadInput(
                f"documents and query are {length} tokens, and the model reads {self._longest}: "
                "rank fewer or shorter documents at a time"
            )
        ids = torch.tensor([behind if read else [*text, *behind]])
        mask = torch.ones(1, length, dtype=torch.int64)
        rows = self._run(input_ids=ids, attention_mask=mask, **read)[ATTENTION][0]
        if count > len(rows):
            raise BadInput(
                f"the query is {count} tokens, and the artifact gives the attention of "
                f"{len(rows)}: make it with rerank-by-attention{{queries={count}}} or more"
            )
        return rows[-count:].mean(0)
