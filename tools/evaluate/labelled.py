"""Samples with labels of a person's: JSON lines with ``text`` or ``image``, and ``label``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.core.errors import BadInput
from ...ir.load.side_files import read_json
from ..data.images import Preprocessing
from .data_lines import lines_of
from .pictures import BATCH, Exam
from .sentences import encoded
from .subject import IMAGE, Subject
from .task import Setting

FORM = 'a line {"text": "...", "label": 2} for each sample, or "image": "a.png" in place of text'


@dataclass(frozen=True)
class Labelled:
    """What is read of one line: a text, or the path of an image; the class, and its name."""

    content: str
    label: int
    name: str


def labelled(subject: Subject, setting: Setting) -> list[Labelled]:
    """The lines of ``setting.data``, the first ``setting.samples`` of them.

    A label is the number of a class or its name in the model's ``config.json`` (``id2label``).
    Raises ``Missing`` without a file, ``BadInput`` for a line without a label, or of no class.
    """
    path, key = setting.data, "image" if subject.kind == IMAGE else "text"
    lines = lines_of(path, "classify", FORM, (key,), f"labels for {subject.name}")
    names = read_json(subject.folder, "config.json").get("id2label")
    known = {str(name): int(number) for number, name in names.items()} if names else {}
    return [
        Labelled(line[key], *_label(line, known, f"{path}, sample {number}"))
        for number, line in enumerate(lines[: setting.samples], 1)
    ]


def _label(line: dict[str, Any], known: dict[str, int], where: str) -> tuple[int, str]:
    label = line.get("label")
    if isinstance(label, str) and label in known:
        return known[label], label
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        names = f" or one of {', '.join(sorted(known)[:8])}" if known else ""
        raise BadInput(f"{where}: label is {label!r}, and takes the number of a class{names}")
    return label, next((name for name, number in known.items() if number == label), str(label))


def exam(subject: Subject, setting: Setting) -> Exam:
    """The samples as inputs, and what is right. Raises as ``labelled``, and for images as
    ``Preprocessing``."""
    samples = labelled(subject, setting)
    answers = [[(s.name, s.label) for s in part] for part in _parts(samples)]
    if subject.kind != IMAGE:
        texts = [sample.content for sample in samples]
        return Exam([part.inputs for part in encoded(subject, texts)], answers, len(samples))
    if subject.view is None or setting.data is None:
        raise BadInput(f"{subject.name}: give the graph or the artifact's folder: an executable "
                       "does not say how images are prepared")  # fmt: skip
    prepared, folder = Preprocessing.of(subject.view), Path(setting.data).parent
    batches = [
        {"pixel_values": torch.stack([prepared.read(folder / s.content) for s in part])}
        for part in _parts(samples)
    ]
    return Exam(batches, answers, len(samples))


def _parts(samples: Sequence[Labelled]) -> list[Sequence[Labelled]]:
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
