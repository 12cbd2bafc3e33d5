"""``outputs``: whether whatever a model gives stays what the original gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.core.errors import BadInput
from ...ir.run.inputs import sample_inputs
from ...ir.structure.cache_slots import answers
from ..data.calibration import read
from .stats import Interval, bootstrap
from .subject import Subject
from .task import EvalResult, Finite, Setting, Task

SAMPLES = 64
RANDOM_BATCHES = 4
"""Of what is made up for a graph, whose sizes are those that it is known to take."""
RANDOM_ROWS, RANDOM_LENGTH = 8, 16
"""Of what is made up for an executable."""
Batch = dict[str, torch.Tensor]


class Outputs(Task):
    """Each output against the original's, for models of any kind: detection, speech, diffusion.

    ``cosine``: mean over the samples, of the worst output. ``rel_l2``: relative L2 error over all
    samples, of the worst output. ``top1``: share of equal most likely entries along the last
    dimension of the outputs that are named after logits; ``kl``: mean of KL(original || model)
    along it, in nats. Values under a padding mask count for nothing.
    A sample is a row of the first 64 that ``--data`` holds (whatever ``--calib`` takes), else of
    the model's own samples, else of random inputs. Intervals: bootstrap over the samples.
    """

    name = "outputs"
    needs_reference = True
    headlines: ClassVar = {"cosine": "higher", "rel_l2": "lower", "top1": "higher", "kl": "lower"}
    proportions = ("cosine", "top1")

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        assert reference is not None
        batches, note = _batches(reference, setting)
        expected = []
        for number, batch in enumerate(batches):
            setting.progress(f"{self.name} of {reference.name}", number, len(batches))
            expected.append(answers(reference.run(batch)))
        return [self._judge(s, reference, batches, expected, note, setting) for s in subjects]

    def _judge(
        self, subject: Subject, reference: Subject, batches: Sequence[Batch],
        expected: Sequence[Mapping[str, torch.Tensor]], note: str, setting: Setting,
    ) -> EvalResult:  # fmt: skip
        finite = Finite(self.name, subject, "outputs")
        sums: dict[str, list[NDArray[np.float64]]] = {}
        for number, (batch, original) in enumerate(zip(batches, expected, strict=True)):
            setting.progress(f"{self.name} of {subject.name}", number, len(batches))
            actual = original if subject is reference else answers(subject.run(batch))
            for name, value in original.items():
                if name not in actual or actual[name].shape != value.shape:
                    raise BadInput(
                        f"{subject.name} gives no {name} {list(value.shape)}, as {reference.name} "
                        "does: they are not versions of one model, or it has fewer positions"
                    )
                finite(actual[name])
                sums.setdefault(name, []).append(_sums(name, value, actual[name], batch))
        finite.settle()
        tables = {name: np.concatenate(parts, axis=1) for name, parts in sums.items()}
        return self._result(tables, note, setting)

    def _result(
        self, tables: Mapping[str, NDArray[np.float64]], note: str, setting: Setting
    ) -> EvalResult:
        detail = {
            name: {figure: float(make(table.sum(1))) for figure, make in _FIGURES.items()
                   if figure not in _OF_LOGITS or table[5].any()}
            for name, table in tables.items()
        }  # fmt: skip
        figures: dict[str, float] = {}
        interval: dict[str, Interval] = {}
        for figure, make in _FIGURES.items():
            known = {name: row[figure] for name, row in detail.items() if figure in row}
            if not known:
                continue
            low = self.headlines[figure] == "lower"
            worst = (max if low else min)(known, key=lambda name: known[name])
            figures[figure] = known[worst]
            ends = bootstrap(tables[worst], make, setting.seed)
            interval |= {} if ends is None else {figure: ends}
        count = next(iter(tables.values())).shape[1]
        notes = (note,) if note else ()
        return EvalResult(self.name, figures, interval, count, "samples", detail, notes)


_FIGURES: Mapping[str, Callable[[Any], Any]] = {
    "cosine": lambda s: s[3] / s[2],
    "rel_l2": lambda s: np.sqrt(s[0] / np.maximum(s[1], 1e-300)),
    "top1": lambda s: s[4] / np.maximum(s[5], 1e-300),
    "kl": lambda s: s[6] / np.maximum(s[5], 1e-300),
}
"""Each figure by the sums of ``_sums``."""
_OF_LOGITS = ("top1", "kl")


def _sums(
    name: str, expected: torch.Tensor, actual: torch.Tensor, batch: Batch
) -> NDArray[np.float64]:
    """``[7, samples]``: squared error, squared norm, one, cosine, equal entries, entries, KL."""
    rows = next(iter(batch.values())).shape[0]
    mask = _real(expected, batch)
    first, second = expected.double(), actual.double()
    if mask is not None:
        pairs = [(first[i][mask[i]], second[i][mask[i]]) for i in range(rows)]
    elif expected.dim() and expected.shape[0] == rows:
        pairs = list(zip(first, second, strict=True))
    else:
        pairs = [(first, second)]
    table = np.zeros((7, len(pairs)))
    for number, (a, b) in enumerate(pairs):
        norm = float(a.norm() * b.norm())
        cosine = float((a * b).sum()) / norm if norm else float(bool(torch.equal(a, b)))
        table[:4, number] = float(((a - b) ** 2).sum()), float((a**2).sum()), 1.0, cosine
        if "logits" in name and a.dim():
            equal = a.argmax(-1) == b.argmax(-1)
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            # Rounding makes the KL of equal distributions -1e-17 now and then.
            kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
            table[4:, number] = int(equal.sum()), equal.numel(), float(kl.sum())
    return table


def _real(output: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """The positions of an output that are no padding; ``None`` where it has no such positions."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or output.shape[:2] != mask.shape:
        return None
    return mask.bool()


def _batches(subject: Subject, setting: Setting) -> tuple[list[Batch], str]:
    """What a model is run on, and a note where it is made up."""
    most = setting.samples or SAMPLES
    if setting.data is not None:
        if subject.view is None:
            raise BadInput(f"{subject.name}: an executable does not say what its inputs are: give "
                           "the graph or the artifact's folder")  # fmt: skip
        return read(str(setting.data), subject.view, samples=most).batches, ""
    own = subject.view.source.samples if subject.view is not None else None
    if own:
        taken, count = [], 0
        for batch in own:
            if count >= most:
                break
            rows = next(iter(batch.values())).shape[0]
            taken.append(dict(batch))
            count += rows
        return taken, ""
    if subject.view is None:
        batches = [subject.example(RANDOM_ROWS, min(RANDOM_LENGTH, subject.max_tokens))]
    else:
        batches = [sample_inputs(subject.view, seed=seed) for seed in range(RANDOM_BATCHES)]
    return batches, "the inputs are random: give some of the model's own with --data"
