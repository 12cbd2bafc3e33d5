"""``embed``: whether sentence vectors and what they retrieve stay the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput
from .sentence_head import SentenceHead
from .sentences import SENTENCES, TOKENS, encoded, sentences
from .stats import bootstrap, wilson
from .subject import EMBEDDING, Subject
from .task import EvalResult, Finite, Setting, Task, limited

WHOLE = "sentence_embedding"
"""The output of a graph that holds the modules behind the model too."""


class Embed(Task):
    """Sentence vectors against the original's.

    ``cosine``: mean cosine of a sentence's vector with the original's. ``retrieval``: share of
    sentences whose nearest other sentence, by cosine, is the one that the original finds. A sample
    is a sentence (256 of Python's language reference, or the documents of ``data``), cut to 128
    tokens, whose vectors become one by the modules of sentence-transformers behind the model
    (``sentence_head``), else by their mean. Intervals: bootstrap over sentences for ``cosine``,
    Wilson for ``retrieval``.
    """

    name = "embed"
    kinds = (EMBEDDING,)
    needs_reference = True
    headlines: ClassVar = {"cosine": "higher", "retrieval": "higher"}
    proportions = ("cosine", "retrieval")

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        subject.tokenizer_file()
        _head(subject)
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
        head = _head(subject)
        skipped = head.skipped(subject.tokenizer())
        given = [head.text(text) for text in texts]
        for part in encoded(subject, given, min(TOKENS, head.longest or TOKENS)):
            setting.progress(f"{self.name} of {subject.name}", sum(map(len, pooled)), len(texts))
            outputs, mask = subject.run(part.inputs), part.inputs["attention_mask"]
            whole = outputs.get(WHOLE)
            pooled.append(
                head.vectors(outputs["last_hidden_state"], mask, skipped)
                if whole is None else whole.double()
            )  # fmt: skip
        vectors = torch.cat(pooled)
        finite = Finite(self.name, subject, "sentences")
        for vector in vectors:
            finite(vector)
        finite.settle()
        return torch.nn.functional.normalize(vectors, dim=1)


def _head(subject: Subject) -> SentenceHead:
    """What stands behind the model, but for one whose graph gives the vector itself."""
    return SentenceHead.of(subject.folder, inside=WHOLE in subject.output_names)


def _nearest(vectors: torch.Tensor) -> torch.Tensor:
    """The other sentence that is nearest to each, ``[sentences]``."""
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-2.0)
    return similarity.argmax(1)
