"""``perplexity``: how well the next token of real text is predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from .documents import Window, batched, check_text, chosen_windows, text_logits
from .stats import bootstrap
from .subject import TEXT, Subject
from .task import EvalResult, Finite, Setting, Task

LN2 = math.log(2)


class Perplexity(Task):
    """``exp`` of the mean negative log-likelihood of a token, over sliding windows.

    Documents stand one after another. A sample is a window (160 of them; ``samples``, ``window``,
    ``stride`` and ``data`` change that). Logits are float32, log-likelihoods float64 and summed so.
    ``bits_per_byte`` is the same sum over the UTF-8 bytes of the text: it compares models whose
    tokenizers differ. Intervals: bootstrap over windows.
    """

    name = "perplexity"
    kinds = (TEXT,)
    headlines: ClassVar = {"perplexity": "lower"}

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        check_text(subject, setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self._judge(subject, setting) for subject in subjects]

    def _judge(self, subject: Subject, setting: Setting) -> EvalResult:
        windows, notes = chosen_windows(subject, setting)
        losses = self._losses(subject, windows, setting)
        tokenizer = subject.tokenizer()
        sizes = [
            len(tokenizer.decode(list(w.ids[-w.scored :])).encode("utf-8")) for w in windows
        ]  # fmt: skip
        sums = np.array([losses, [w.scored for w in windows], sizes], dtype=np.float64)
        total = sums.sum(axis=1)
        figures = {
            "perplexity": math.exp(total[0] / total[1]),
            "bits_per_byte": float(total[0] / LN2 / max(1.0, total[2])),
        }
        drawn = {
            "perplexity": bootstrap(sums, lambda s: np.exp(s[0] / s[1]), setting.seed),
            "bits_per_byte": bootstrap(
                sums, lambda s: s[0] / LN2 / np.maximum(1.0, s[2]), setting.seed
            ),
        }
        return EvalResult(
            self.name, figures, {n: ends for n, ends in drawn.items() if ends is not None},
            len(windows), "windows",
            detail={"tokens": int(total[1]), "window": max(len(w.ids) for w in windows)},
            notes=tuple(notes),
        )

    def _losses(self, subject: Subject, windows: Sequence[Window], setting: Setting) -> list[float]:
        """Negative log-likelihood in nats of each window's scored tokens, summed."""
        losses = [0.0] * len(windows)
        finite = Finite(self.name, subject, "windows")
        done = 0
        for rows, inputs in batched([w.ids for w in windows]):
            setting.progress(f"{self.name} of {subject.name}", done, len(windows))
            logits = text_logits(subject, inputs)
            for row, index in enumerate(rows):
                window = windows[index]
                end = len(window.ids)
                predictions = logits[row, end - 1 - window.scored : end - 1]
                if finite(predictions):
                    targets = torch.tensor(subject.columns(window.ids[-window.scored :]))
                    losses[index] = nll(predictions, targets)
            done += len(rows)
        finite.settle()
        return losses


def nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum over positions of ``-log softmax(logits)[target]`` in nats, in float64.

    ``logits`` is ``[n, vocab]``, ``targets`` ``[n]``.
    """
    wide = logits.double()
    picked = wide.gather(1, targets[:, None])[:, 0]
    return float((torch.logsumexp(wide, dim=1) - picked).sum())
