"""Our models under lm-evaluation-harness (PyPI ``lm-eval``), so that public tasks run on them.

::

    import lm_eval
    from graphwright.tools.evaluate.harness import language_model
    lm_eval.simple_evaluate(language_model("out4"), tasks=["lambada_openai"])

The harness fetches its tasks' data itself, or reads them from disk. ``lm-eval`` is an extra:
``pip install 'graphwright[lm-eval]'``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ...backends.generation.decode import Decoder
from ...backends.generation.sampling import Sampling
from ...ir.core.errors import BadInput, Missing
from ...ir.core.view import View
from .documents import batched, text_logits, windows
from .subject import TEXT, Subject

MOST_TOKENS = 256
"""Of an answer, where a task does not say: the harness's own default."""


class Request(Protocol):
    """What is asked: ``(context, continuation)``, ``(text,)`` or ``(context, settings)``."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Scorer:
    """The three requests that the harness makes of a language model."""

    def __init__(self, subject: Subject) -> None:
        if subject.kind != TEXT:
            raise BadInput(f"{subject.describe()} is not a language model, which the harness needs")
        self._subject = subject
        self._tokenizer: Any = subject.tokenizer()

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the sum of its tokens' log probabilities, and
        whether greedy decoding gives it."""
        return self._scored([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Of each whole text: the log probability of all of its tokens behind a first one, in
        windows as long as the model takes."""
        scores = []
        for request in requests:
            (text,) = request.args
            head, tail = self._split("", text)
            size = self._subject.max_tokens
            parts = windows([*head, *tail], size, max(1, size - 1))
            pairs = [(list(w.ids[: -w.scored]), list(w.ids[-w.scored :])) for w in parts]
            scores.append(sum(score for score, _ in self._scored(pairs)))
        return scores

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Greedy text behind each context, up to the first of its stopping texts."""
        decoder = Decoder(self._subject.executable, self._subject.max_tokens)
        return [self._written(decoder, *request.args) for request in requests]

    def _written(self, decoder: Decoder, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks") or MOST_TOKENS)
        ids = self._tokenizer.encode(context).ids[-max(1, self._subject.max_tokens - most) :]
        tokens: list[int] = []
        text = ""
        steps = decoder.decode([ids], max_new_tokens=most, sampling=Sampling(), eos=frozenset())
        for (token,) in steps:
            tokens.append(int(token or 0))
            text = self._tokenizer.decode(tokens)
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context ends in the tokens of the whole text; spaces at its
        end go with the continuation, as tokenizers put them in front of words."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        whole = self._tokenizer.encode(kept + continuation).ids
        head = self._tokenizer.encode(kept).ids if kept else whole[:1]
        return whole[: len(head)], whole[len(head) :]

    def _scored(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        cut = self._subject.max_tokens
        sequences = [((head + tail)[-cut:], min(len(tail), cut - 1)) for head, tail in pairs]
        scores: dict[int, tuple[float, bool]] = {}
        for rows, inputs in batched([ids for ids, _ in sequences]):
            likely = text_logits(self._subject, inputs).double().log_softmax(-1)
            for row, index in enumerate(rows):
                ids, count = sequences[index]
                end = len(ids)
                targets = torch.tensor(ids[end - count :])
                part = likely[row, end - count - 1 : end - 1]
                score = float(part[torch.arange(count), targets].sum())
                scores[index] = score, bool((part.argmax(-1) == targets).all())
        return [scores[index] for index in range(len(sequences))]


def language_model(
    model: View | str | Path | Subject, *, tokenizer: str | Path | None = None
) -> Any:
    """An ``lm_eval.api.model.LM`` of an artifact's folder, a graph, or a model by name.

    Raises ``Missing`` without ``lm-eval`` or a tokenizer, ``BadInput`` for what writes no text.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise Missing(f"{error}: pip install 'graphwright[lm-eval]'") from None

    class Judged(Scorer, LM):  # type: ignore[misc]
        def __init__(self, subject: Subject) -> None:
            LM.__init__(self)
            Scorer.__init__(self, subject)

    return Judged(Subject.of(model, tokenizer=tokenizer))
