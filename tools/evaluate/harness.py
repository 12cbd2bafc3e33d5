"""Our models under lm-evaluation-harness (PyPI ``lm-eval``), so that public tasks run on them.

::

    import lm_eval
    from graphwright.tools.evaluate.harness import language_model
    lm_eval.simple_evaluate(language_model("out4"), tasks=["lambada_openai"])

The harness fetches its tasks' data itself, or reads them from disk. ``lm-eval`` is an extra:
``pip install 'graphwright[lm-eval]'``. What is counted is what its own model for transformers
(``hf``) counts, so that figures compare: ``python -m graphwright.tools.bench.harness`` holds both
against each other.
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
from ...ir.load.side_files import end_tokens, named_token
from .documents import batched, text_logits
from .subject import TEXT, Subject

MOST_TOKENS = 256
"""Of an answer, where a task does not say: the harness's own default."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""By which a task says it; the first counts."""


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
        self._start = named_token(subject.folder, "bos_token", "eos_token")
        """What stands before a text that is scored whole."""

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the sum of its tokens' log probabilities, and
        whether greedy decoding gives it."""
        return self._scored([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Of each whole text: the log probability of all of its tokens, the first of them behind
        the tokenizer's first token (where it has none, its last), in windows side by side, each as
        long as the model takes and behind one token of the window before.

        A first token that the tokenizer writes itself counts as any other, as in the harness.
        """
        scores = []
        for request in requests:
            (text,) = request.args
            ids, size = [*self._before(), *self._encoded(text)], self._subject.max_tokens
            ends = [*range(1 + size, len(ids), size), len(ids)] if len(ids) > 1 else []
            pairs, last = [], 1
            for end in ends:
                pairs.append((ids[max(0, end - size - 1) : last], ids[last:end]))
                last = end
            scores.append(sum(score for score, _ in self._scored(pairs)))
        return scores

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Text behind each context, up to the first of its stopping texts or the model's own end;
        greedy, unless a task asks for samples (``do_sample``, ``temperature``)."""
        decoder = Decoder(self._subject.executable, self._subject.max_tokens)
        return [self._written(decoder, *request.args) for request in requests]

    def _written(self, decoder: Decoder, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = next((int(settings[key]) for key in LIMITS if settings.get(key)), MOST_TOKENS)
        ids = self._encoded(context)[-max(1, self._subject.max_tokens - most) :]
        tokens: list[int] = []
        text = ""
        steps = decoder.decode([ids], max_new_tokens=most, sampling=_sampling(settings),
                               eos=end_tokens(self._subject.folder))  # fmt: skip
        for (token,) in steps:
            tokens.append(int(token or 0))
            text = self._tokenizer.decode(tokens)
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)

    def _encoded(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text; one that begins with the first token in words is given no other."""
        begins = self._start is not None and text.startswith(self._start)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special and not begins).ids
        return ids

    def _before(self) -> list[int]:
        token = None if self._start is None else self._tokenizer.token_to_id(self._start)
        return [] if token is None else [token]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context as it is alone, and those of the whole text behind as many; spaces
        at its end go with the continuation, as tokenizers put them in front of words. Without a
        context the first token stands before the continuation. All of it is the harness's own
        way, by which a word that is cut in two is read otherwise than in one."""
        if not context:
            tail, head = self._encoded(continuation, special=False), self._before()
            return (head, tail) if head and head != tail[:1] else (tail[:1], tail[1:])
        head = self._encoded(context.rstrip())
        return head, self._encoded(context + continuation)[len(head) :]

    def _scored(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The last token of each pair is predicted, not read."""
        cut = self._subject.max_tokens
        sequences = [((head + tail)[-cut - 1 :], min(len(tail), cut)) for head, tail in pairs]
        scores: dict[int, tuple[float, bool]] = {}
        for rows, inputs in batched([ids[:-1] for ids, _ in sequences]):
            likely = text_logits(self._subject, inputs).double().log_softmax(-1)
            for row, index in enumerate(rows):
                ids, count = sequences[index]
                end = len(ids) - 1
                targets = torch.tensor(ids[len(ids) - count :])
                part = likely[row, end - count : end]
                score = float(part[torch.arange(count), targets].sum())
                scores[index] = score, bool((part.argmax(-1) == targets).all())
        return [scores[index] for index in range(len(sequences))]


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How a task asks for tokens, in the words of transformers' ``generate``."""
    if not settings.get("do_sample"):
        return Sampling()
    named = {key: settings[key] for key in ("top_p", "top_k") if settings.get(key) is not None}
    temperature = settings.get("temperature")
    return Sampling(temperature=1.0 if temperature is None else float(temperature), **named)


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
