"""Samples with labels of a person's: a text, a pair of texts or an image a line, and a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.load.side_files import read_json
from ..data.images import Preprocessing
from ..data.table_lines import SEPARATORS, table_lines
from ..data.text_lines import PAIRS, Text
from .data_lines import lines_of
from .pictures import BATCH, Exam
from .sentences import encoded
from .subject import IMAGE, Subject
from .task import Setting

FORM = (
    'a line {"text": "...", "label": 2} for each sample, "text_pair" beside it for a pair, or '
    '"image": "a.png" in place of text; or .csv or .tsv with these columns'
)
TEXTS = (("text",), ("sentence",))
"""What texts are called, here and in GLUE's files."""
LABELS = ("label", "labels")


@dataclass(frozen=True)
class Labelled:
    """What is read of one line: a text, two, or the path of an image; the class, and its name."""

    content: Text
    label: int
    name: str


def labelled(subject: Subject, setting: Setting) -> list[Labelled]:
    """The lines of ``setting.data``, the first ``setting.samples`` of them.

    A label is the number of a class or its name in the model's ``config.json`` (``id2label``).
    Raises ``Missing`` without a file, ``BadInput`` for a line without a label or a text, or of no
    class, and for a model whose outputs are no classes of which one is right.
    """
    path, config = setting.data, read_json(subject.folder, "config.json")
    lines = _lines(path, f"labels for {subject.name}")
    names = config.get("id2label")
    known = {str(name): int(number) for number, name in names.items()} if names else {}
    count = _classes(subject)
    if count == 1 or config.get("problem_type") == "multi_label_classification":
        what = "one number, a score" if count == 1 else "classes of which several may be right"
        raise BadInput(
            f"{subject.name} gives {what}, and classify counts likeliest classes: judge it by "
            "agreement or outputs, which hold it to its source"
        )
    found = []
    for number, line in enumerate(lines[: setting.samples], 1):
        where = f"{path}, sample {number}"
        content = _content(line, where, image=subject.kind == IMAGE)
        found.append(Labelled(content, *_label(line, known, count, where)))
    return found


def _lines(path: Path | None, needs: str) -> list[dict[str, Any]]:
    if path is None or path.suffix.lower() not in SEPARATORS:
        return lines_of(path, "classify", FORM, (), needs)
    if not path.is_file():
        raise Missing(f"{path}: no such file: --data of classify takes {FORM}")
    lines = table_lines(path)
    if not lines:
        raise BadInput(f"{path}: empty: it takes a line of names of columns, and {FORM}")
    return lines


def _content(line: Mapping[str, Any], where: str, *, image: bool) -> Text:
    wanted = (("image",),) if image else (*PAIRS, *TEXTS)
    held = next((keys for keys in wanted if all(isinstance(line.get(k), str) for k in keys)), None)
    if held is None:
        found = ", ".join(map(str, line)) or "nothing"
        raise BadInput(f"{where}: no `{wanted[-2 if len(wanted) > 1 else 0][0]}` in {found}; it "
                       f"takes {FORM}")  # fmt: skip
    texts = [str(line[key]) for key in held]
    return (texts[0], texts[1]) if len(texts) > 1 else texts[0]


def _label(
    line: Mapping[str, Any], known: Mapping[str, int], count: int | None, where: str
) -> tuple[int, str]:
    label: Any = next((line[key] for key in LABELS if line.get(key) is not None), None)
    if isinstance(label, str) and label in known:
        return known[label], label
    number = int(label) if isinstance(label, str) and label.strip().isdecimal() else label
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        names = f" or one of {', '.join(sorted(known)[:8])}" if known else ""
        raise BadInput(f"{where}: label is {label!r}, and takes the number of a class{names}")
    if count is not None and number >= count:
        raise BadInput(f"{where}: label is {number}, and the model has classes 0 to {count - 1}")
    return number, next((name for name, n in known.items() if n == number), str(number))


def _classes(subject: Subject) -> int | None:
    """How many logits there are, where that is known."""
    if subject.view is None or "logits" not in subject.output_names:
        return None
    logits = subject.view.outputs()[subject.output_names.index("logits")]
    last = (subject.view.type(logits).shape or (None,))[-1]
    return last if isinstance(last, int) else None


def exam(subject: Subject, setting: Setting) -> Exam:
    """The samples as inputs, and what is right; texts are cut to what the model takes. Raises as
    ``labelled``, and for images as ``Preprocessing``."""
    samples = labelled(subject, setting)
    answers = [[(s.name, s.label) for s in part] for part in _parts(samples)]
    if subject.kind != IMAGE:
        texts = [sample.content for sample in samples]
        rows = encoded(subject, texts, subject.max_tokens)
        return Exam([part.inputs for part in rows], answers, len(samples))
    if subject.view is None or setting.data is None:
        raise BadInput(f"{subject.name}: give the graph or the artifact's folder: an executable "
                       "does not say how images are prepared")  # fmt: skip
    prepared, folder = Preprocessing.of(subject.view), Path(setting.data).parent
    batches = [
        {"pixel_values": torch.stack([prepared.read(folder / str(s.content)) for s in part])}
        for part in _parts(samples)
    ]
    return Exam(batches, answers, len(samples))


def _parts(samples: Sequence[Labelled]) -> list[Sequence[Labelled]]:
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
