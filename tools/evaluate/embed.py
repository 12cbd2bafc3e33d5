"""``embed``: whether sentence vectors and what they retrieve stay the original's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput
from ...ir.load.side_files import read_json
from .sentences import SENTENCES, encoded, sentences
from .stats import bootstrap, wilson
from .subject import EMBEDDING, Subject
from .task import EvalResult, Finite, Setting, Task, limited


class Embed(Task):
    """Sentence vectors against the original's.

    ``cosine``: mean cosine of a sentence's vector with the original's. ``retrieval``: share of
    sentences whose nearest other sentence, by cosine, is the one that the original finds. A sample
    is a sentence (256 of Python's language reference, or the documents of ``data``), cut to 128
    tokens, whose vectors become one as ``1_Pooling`` says, else by their mean. Intervals: bootstrap
    over sentences for ``cosine``, Wilson for ``retrieval``.
    """

    name = "embed"
    kinds = (EMBEDDING,)
    needs_reference = True
    headlines: ClassVar = {"cosine": "higher", "retrieval": "higher"}
    proportions = ("cosine", "retrieval")

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        subject.tokenizer_file()
        if len(sentences(setting)) < 3:
            raise BadInput("embed: retrieval among fewer than 3 sentences says nothing")

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        assert reference is not None
        available = sentences(setting)
        count, notes = limited(len(available), setting, SENTENCES, "sentences")
        chosen = available[:count]
        if count < 3:
            raise BadInput("embed: retrieval among fewer than 3 sentences says nothing")
        original = self._vectors(reference, chosen, setting)
        nearest = _nearest(original)
        results = []
        for subject in subjects:
            same = subject is reference
            vectors = original if same else self._vectors(subject, chosen, setting)
            if vectors.shape != original.shape:
                raise BadInput(
                    f"{subject.name} gives vectors of {vectors.shape[1]}, the original of "
                    f"{original.shape[1]}: they are not versions of one model"
                )
            cosines = (vectors * original).sum(1).clamp(-1.0, 1.0).tolist()
            hits = int((_nearest(vectors) == nearest).sum())
            interval = {"retrieval": wilson(hits, count)}
            ends = bootstrap([cosines], lambda s: s[0] / count, setting.seed)
            interval |= {} if ends is None else {"cosine": ends}
            figures = {"cosine": sum(cosines) / count, "retrieval": hits / count}
            detail = {"lowest_cosine": min(cosines)}
            results.append(
                EvalResult(self.name, figures, interval, count, "sentences", detail, tuple(notes))
            )
        return results

    def _vectors(self, subject: Subject, texts: Sequence[str], setting: Setting) -> torch.Tensor:
        """Unit vectors ``[sentences, width]`` f64."""
        pooled: list[torch.Tensor] = []
        for part in encoded(subject, texts):
            setting.progress(f"{self.name} of {subject.name}", sum(map(len, pooled)), len(texts))
            outputs, mask = subject.run(part.inputs), part.inputs["attention_mask"]
            pooled.append(_pooled(outputs, mask, pooling(subject.folder)))
        vectors = torch.cat(pooled)
        finite = Finite(self.name, subject, "sentences")
        for vector in vectors:
            finite(vector)
        finite.settle()
        return torch.nn.functional.normalize(vectors, dim=1)


def pooling(folder: str | Path | None) -> str:
    """How sentence-transformers makes one vector of those of the tokens: ``cls``, ``max``,
    ``lasttoken``, or else ``mean``, by ``1_Pooling/config.json``."""
    config = read_json(folder, "1_Pooling/config.json")
    named = config.get("pooling_mode")
    old = {"cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}
    modes = [mode for mode, key in old.items()
             if named == mode or config.get(f"pooling_mode_{key}") is True]  # fmt: skip
    return modes[0] if len(modes) == 1 else "mean"


def _pooled(outputs: dict[str, torch.Tensor], mask: torch.Tensor, mode: str) -> torch.Tensor:
    """The sentence vectors; where there are none those of the tokens under the mask as one."""
    if "sentence_embedding" in outputs:
        return outputs["sentence_embedding"].double()
    tokens, kept = outputs["last_hidden_state"].double(), mask[:, :, None].double()
    rows = torch.arange(len(tokens))
    if mode == "cls":
        return tokens[:, 0]
    if mode == "lasttoken":
        return tokens[rows, mask.sum(1) - 1]
    if mode == "max":
        return tokens.masked_fill(kept == 0, -torch.inf).amax(1)
    return (tokens * kept).sum(1) / kept.sum(1).clamp(min=1.0)


def _nearest(vectors: torch.Tensor) -> torch.Tensor:
    """The other sentence that is nearest to each, ``[sentences]``."""
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-2.0)
    return similarity.argmax(1)
