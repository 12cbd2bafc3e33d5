"""Questions about a person's own images, answered in words: VQAv2's soft accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.generation.decode import Decoder
from ...backends.generation.sampling import Sampling
from ...ir.core.errors import BadInput
from ...ir.load.side_files import end_tokens
from ..data.images import Placeholders, Preprocessing
from .data_lines import lines_of
from .stats import bootstrap
from .subject import Subject
from .task import EvalResult, Setting

FORM = (
    'a line {"image": "a.png", "question": "...", "answers": ["..."]} for each question, with '
    '"prompt" where the model wants more than the question around it'
)
MOST_TOKENS = 12
"""Of an answer."""
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass(frozen=True)
class OwnQuestion:
    """A question about an image file, and the answers that people gave."""

    image: Path
    prompt: str
    answers: tuple[str, ...]


def own_questions(setting: Setting) -> list[OwnQuestion]:
    """The lines of ``setting.data``, the first ``setting.samples`` of them.

    Raises ``Missing`` for a file that is not there, ``BadInput`` for a line that lacks something.
    """
    assert setting.data is not None
    path = setting.data
    questions = []
    for number, line in enumerate(lines_of(path, "vqa", FORM, ("image", "question")), 1):
        answers = line.get("answers", line.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
            raise BadInput(f"{path}, question {number}: has no answers; it takes {FORM}")
        prompt = line.get("prompt", line["question"])
        questions.append(OwnQuestion(path.parent / line["image"], str(prompt), tuple(answers)))
    return questions[: setting.samples]


def _is_text(answer: object) -> bool:
    return isinstance(answer, str)


def soft_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQAv2's (Goyal et al. 2017, arXiv 1612.00837): ``min(equal answers / 3, 1)``, the mean over
    all subsets that leave one answer out; an answer given three times is right. With fewer than
    four answers one that is equal is enough."""
    equal = [normalized(answer) == normalized(reply) for answer in answers]
    if len(equal) < 4:
        return float(any(equal))
    total = sum(equal)
    return sum(min((total - one) / 3, 1.0) for one in equal) / len(equal)


def normalized(answer: str) -> str:
    """Lower case, digits for number words, no articles, no punctuation but inside numbers."""
    text = re.sub(r"(?<!\d)[.,:](?!\d)|[^\w\s.,:']", " ", answer.lower().replace("\n", " "))
    words = (w.strip(".,:") for w in text.split())
    kept = (w for w in words if w and w not in ("a", "an", "the"))
    return " ".join(str(_NUMBERS.index(w)) if w in _NUMBERS else w for w in kept)


def judge(task: str, subject: Subject, setting: Setting) -> EvalResult:
    """Greedy answers to all questions, and their mean soft accuracy. Interval: bootstrap."""
    asked = own_questions(setting)
    if subject.view is None:
        raise BadInput(f"{subject.name}: give the graph or the artifact's folder: an executable "
                       "does not say how images are prepared")  # fmt: skip
    marks, prepared = Placeholders.of(subject.view), Preprocessing.of(subject.view)
    tokenizer: Any = subject.tokenizer()
    decoder, eos = Decoder(subject.executable, subject.max_tokens), end_tokens(subject.folder)
    scores, replies = [], []
    for number, question in enumerate(asked):
        setting.progress(f"{task} of {subject.name}", number, len(asked))
        ids = marks.expand(tokenizer.encode(question.prompt).ids)
        steps = decoder.decode(
            [ids], max_new_tokens=MOST_TOKENS, sampling=Sampling(), eos=eos,
            images=[prepared.read(question.image)],
        )  # fmt: skip
        tokens = [token for (token,) in steps if token is not None and token not in eos]
        replies.append(tokenizer.decode(tokens).strip())
        scores.append(soft_accuracy(replies[-1], question.answers))
    ends = bootstrap([scores], lambda s: s[0] / len(scores), setting.seed)
    return EvalResult(
        task, {"accuracy": sum(scores) / len(scores)}, {} if ends is None else {"accuracy": ends},
        len(scores), "questions", detail={"answers": replies},
    )  # fmt: skip
