"""``answer``: questions that a stretch of a text answers, judged as SQuAD is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...ir.core.errors import BadInput
from ...ir.load.side_files import padding_token
from .data_lines import lines_of
from .stats import bootstrap, wilson
from .subject import ANSWERS, Subject
from .task import EvalResult, Finite, Setting, Task
from .word_scores import exact, f1

FORM = (
    'a line {"question": "...", "context": "...", "answers": ["..."]} for each question; [] where '
    "the context does not answer it"
)
LONGEST, STRIDE = 384, 128
"""Tokens of a window, and those that it shares with the one before it: SQuAD's script's."""
BEST, ANSWER_TOKENS = 20, 30
"""Starts and ends that are tried in each window, and the tokens of an answer at most: the same."""
BATCH = 16


@dataclass(frozen=True)
class Asked:
    """A question, the text that may hold its answer, and what people answered."""

    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """A stretch of a text, from one letter to another, and the sum of both logits; the empty
    stretch stands for no answer."""

    score: float
    start: int
    end: int


class Answer(Task):
    """SQuAD's scores of answers that are a stretch of a text (arXiv 1606.05250, 1806.03822).

    A sample is a line of ``--data FILE.jsonl``: ``question``, ``context`` and ``answers``, as many
    as people gave. ``exact``: share of replies that equal one of them but for case, punctuation and
    articles; ``f1``: of their words, the mean over the questions, of the nearest answer. A reply is
    the likeliest stretch of at most 30 tokens, in windows of 384 that share 128. Where a line has
    no answers, a model may give none, by its first token. Intervals: Wilson for ``exact``,
    bootstrap for ``f1``.
    """

    name = "answer"
    kinds = (ANSWERS,)
    headlines: ClassVar = {"exact": "higher", "f1": "higher"}
    proportions = ("exact", "f1")

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        subject.tokenizer_file()
        _asked(setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self._judge(subject, _asked(setting), setting) for subject in subjects]

    def _judge(self, subject: Subject, asked: Sequence[Asked], setting: Setting) -> EvalResult:
        may_pass = not all(question.answers for question in asked)
        finite = Finite(self.name, subject, "windows")
        spans: list[list[Span]] = [[] for _ in asked]
        for number, window in enumerate(_run(subject, asked, finite)):
            setting.progress(f"{self.name} of {subject.name}", number, len(asked))
            spans[window.question] += window.spans(may_pass)
        finite.settle()
        replies = [_reply(question, row) for question, row in zip(asked, spans, strict=True)]
        pairs = [(reply, one.answers) for reply, one in zip(replies, asked, strict=True)]
        hits, shares = [exact(*pair) for pair in pairs], [f1(*pair) for pair in pairs]
        count = len(asked)
        interval = {"exact": wilson(int(sum(hits)), count)}
        ends = bootstrap([shares], lambda s: s[0] / count, setting.seed)
        interval |= {} if ends is None else {"f1": ends}
        figures = {"exact": sum(hits) / count, "f1": sum(shares) / count}
        return EvalResult(self.name, figures, interval, count, "questions", {"answers": replies})


@dataclass(frozen=True)
class _Window:
    """What a model says of a window: logits ``[tokens]``, and the letters of each token of the
    context (``None`` for the others)."""

    question: int
    start: torch.Tensor
    end: torch.Tensor
    letters: Sequence[tuple[int, int] | None]

    def spans(self, may_pass: bool) -> Iterator[Span]:
        """The likeliest stretches of the context, and where allowed the empty one."""
        if may_pass:
            yield Span(float(self.start[0] + self.end[0]), 0, 0)
        count = min(BEST, len(self.start))
        ends = self.end.topk(count).indices.tolist()
        for start in self.start.topk(count).indices.tolist():
            for end in ends:
                first, last = self.letters[start], self.letters[end]
                if first is None or last is None or not 0 <= end - start < ANSWER_TOKENS:
                    continue
                yield Span(float(self.start[start] + self.end[end]), first[0], last[1])


def _reply(question: Asked, spans: Sequence[Span]) -> str:
    """The likeliest stretch; of several windows that give no answer the least sure one counts."""
    empty = [span for span in spans if span.end == span.start]
    real = [span for span in spans if span.end > span.start]
    best = max(real, key=lambda span: span.score, default=None)
    if best is None or (empty and min(span.score for span in empty) > best.score):
        return ""
    return question.context[best.start : best.end]


def _run(subject: Subject, asked: Sequence[Asked], finite: Finite) -> Iterator[_Window]:
    tokenizer: Any = subject.tokenizer()
    longest = min(LONGEST, subject.max_tokens)
    tokenizer.enable_truncation(longest, stride=min(STRIDE, longest // 4), strategy="only_second")
    pad = padding_token(subject.folder, tokenizer)
    rows: list[tuple[int, Any]] = []
    for number, one in enumerate(asked):
        first = tokenizer.encode(one.question, one.context)
        rows += [(number, row) for row in (first, *first.overflowing)]
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        outputs = subject.run(_padded([row for _, row in part], pad))
        both = zip(outputs["start_logits"], outputs["end_logits"], strict=True)
        for (number, row), (start, end) in zip(part, both, strict=True):
            start, end = start[: len(row.ids)], end[: len(row.ids)]
            finite(torch.stack([start, end]))
            places = zip(row.offsets, row.sequence_ids, strict=True)
            letters = [place if sequence == 1 else None for place, sequence in places]
            yield _Window(number, start, end, letters)


def _padded(rows: Sequence[Any], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(row.ids) for row in rows)

    def table(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    return {
        "input_ids": table([row.ids for row in rows], pad),
        "attention_mask": table([[1] * len(row.ids) for row in rows], 0),
        "token_type_ids": table([row.type_ids for row in rows], 0),
    }


def _asked(setting: Setting) -> list[Asked]:
    """The lines of ``setting.data``, the first ``setting.samples`` of them.

    Raises ``Missing`` without a file, ``BadInput`` for a line that lacks something.
    """
    lines = lines_of(setting.data, "answer", FORM, ("question", "context"), "questions")
    asked = []
    for number, line in enumerate(lines, 1):
        answers = line.get("answers")
        # SQuAD's own files hold {"text": [...], "answer_start": [...]}.
        answers = answers.get("text") if isinstance(answers, dict) else answers
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise BadInput(f"{setting.data}, question {number}: has no answers; it takes {FORM}")
        asked.append(Asked(line["question"], line["context"], tuple(answers)))
    return asked[: setting.samples]
