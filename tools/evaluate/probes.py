"""Inputs on which two models of one kind are compared, and the places where they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...ir.core.errors import BadInput
from . import pictures
from .documents import batched, chosen_windows, text_logits
from .sentences import SENTENCES, encoded, sentences
from .subject import ANSWERS, IMAGE_TEXT, READERS, TEXT, TEXT_CLASSES, Subject
from .task import Setting, limited


@dataclass(frozen=True)
class Place:
    """Positions ``start`` to ``stop`` of one row's logits; they belong to sample ``unit``."""

    unit: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Probe:
    """A batch of inputs and the places in its logits that count."""

    inputs: dict[str, torch.Tensor]
    places: tuple[Place, ...]


def probes(subject: Subject, setting: Setting) -> tuple[list[Probe], int, str, list[str]]:
    """The batches, the number of samples, what a sample is, and notes."""
    if subject.kind == TEXT:
        return _text(subject, setting)
    if subject.kind in READERS:
        return _sentences(subject, setting)
    if subject.kind == IMAGE_TEXT:
        asked = pictures.asked(subject, setting)
        return list(_numbered(asked.batches, -1)), asked.count, "questions", []
    shown = pictures.shown(subject, setting)
    return list(_numbered(shown.batches, 0)), shown.count, "images", []


def _text(subject: Subject, setting: Setting) -> tuple[list[Probe], int, str, list[str]]:
    windows, notes = chosen_windows(subject, setting)
    batches = []
    for rows, inputs in batched([w.ids for w in windows]):
        ends = [len(windows[i].ids) - 1 for i in rows]
        places = tuple(
            Place(i, row, end - windows[i].scored, end)
            for row, (i, end) in enumerate(zip(rows, ends, strict=True))
        )
        batches.append(Probe(inputs, places))
    return batches, len(windows), "windows", notes


def _sentences(subject: Subject, setting: Setting) -> tuple[list[Probe], int, str, list[str]]:
    texts = sentences(setting)
    count, notes = limited(len(texts), setting, SENTENCES, "sentences")
    batches: list[Probe] = []
    first = 0
    for part in encoded(subject, texts[:count]):
        ends = (1,) * len(part.lengths) if subject.kind == TEXT_CLASSES else part.lengths
        places = tuple(Place(first + row, row, 0, end) for row, end in enumerate(ends))
        batches.append(Probe(part.inputs, places))
        first += len(ends)
    return batches, count, "sentences", notes


def _numbered(batches: Sequence[dict[str, torch.Tensor]], position: int) -> Iterator[Probe]:
    """One place a row: position 0 of its logits, or the last one (-1)."""
    count = 0
    for inputs in batches:
        rows = next(iter(inputs.values())).shape[0]
        yield Probe(inputs, tuple(Place(count + r, r, position, position + 1) for r in range(rows)))
        count += rows


def logits(subject: Subject, probe: Probe) -> list[torch.Tensor]:
    """Logits ``[positions, classes]`` f32 at each place of a probe. Where an answer starts and
    where it ends are two positions, whose classes are the tokens."""
    if subject.kind == TEXT:
        scores = text_logits(subject, probe.inputs)
        return [scores[p.row, p.start : p.stop] for p in probe.places]
    outputs = subject.run(probe.inputs)
    if subject.kind == ANSWERS:
        both = torch.stack([outputs["start_logits"], outputs["end_logits"]], 1)
        return [both[p.row, :, p.start : p.stop] for p in probe.places]
    scores = outputs["logits"]
    if scores.dim() == 2:
        scores = scores[:, None]
    if scores.dim() != 3 or scores.shape[0] != len(probe.places):
        raise BadInput(
            f"{subject.name} gives logits {list(scores.shape)} for {len(probe.places)} samples"
        )
    if subject.kind in READERS:
        return [scores[p.row, p.start : p.stop] for p in probe.places]
    return [scores[p.row, p.start :][:1] for p in probe.places]
