"""``vqa``: questions about images."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import own_questions
from .accuracy import Accuracy
from .pictures import Exam, asked
from .subject import IMAGE_TEXT, Subject
from .task import EvalResult, Setting, Task


class Vqa(Accuracy):
    """Share of questions about images that are answered right.

    A sample is a question (500 of the test split of ``ir.load.zoo.scenes``, or of ``details`` for
    a model that has its words), its answer the most
    likely next token; by question type. With ``--data FILE.jsonl`` it is a line of ``image`` (a
    path from the file), ``question`` and ``answers``, answered in words and judged by VQAv2's soft
    accuracy (``own_questions``). Interval: Wilson; of soft accuracy bootstrap over questions.
    """

    name = "vqa"
    kinds = (IMAGE_TEXT,)
    unit = "questions"

    def check(self, subject: Subject, setting: Setting) -> None:
        if setting.data is None:
            super().check(subject, setting)
            return
        Task.check(self, subject, setting)
        subject.tokenizer_file()
        own_questions.own_questions(setting)

    def judge(self, subject: Subject, setting: Setting) -> EvalResult:
        if setting.data is None:
            return super().judge(subject, setting)
        return own_questions.judge(self.name, subject, setting)

    def exam(self, subject: Subject, setting: Setting) -> Exam:
        exam = asked(subject, setting)
        answers = [
            [(kind, subject.columns([token])[0]) for kind, token in part]
            for part in exam.answers
        ]
        return replace(exam, answers=answers)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1]
