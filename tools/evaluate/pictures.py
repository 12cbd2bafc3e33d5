"""Images and questions about them for the tasks of vision models, from ``ir.load.zoo.scenes``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.core.types import Dim
from ...ir.load.side_files import read_json
from ...ir.load.zoo import details, scenes, videos
from .subject import IMAGE, IMAGE_TEXT, Subject
from .task import Setting

IMAGES, QUESTIONS = 1000, 500
BATCH = 32


@dataclass(frozen=True)
class Exam:
    """Inputs in batches, questions of equal length so that no padding is needed, and what is right:
    for each sample of a batch its type and the right class or token."""

    batches: list[dict[str, torch.Tensor]]
    answers: list[list[tuple[str, int]]]
    count: int


def check_pictures(subject: Subject, setting: Setting) -> None:
    """Raise where the shipped images do not fit the model, which is then another's.

    ``BadInput`` for ``data``, which these tasks do not read; ``Missing`` where the model's images
    have another size.
    """
    if setting.data is not None:
        raise BadInput(
            "the images of this task are drawn by ir.load.zoo.scenes: leave out --data, or take "
            "the task outputs for images of your own"
        )
    sizes = 3, *([scenes.VIT_IMAGE] * 2 if subject.kind == IMAGE else [scenes.IMAGE] * 2)
    if subject.kind == IMAGE_TEXT:
        _check_words(subject)
        if of_videos(subject):
            sizes = frame_count(subject), 3, videos.FRAME, videos.FRAME
        elif scene_size(subject) == scenes.LARGE:
            sizes = scenes.CROPS, *sizes
    if subject.view is None:
        return
    for name, value in zip(subject.view.input_names(), subject.view.inputs(), strict=True):
        shape = subject.view.type(value).shape
        if name != "pixel_values" or shape is None:
            continue
        fixed = zip(shape[1:], sizes, strict=False)
        if len(shape) != len(sizes) + 1 or any(isinstance(a, int) and a != b for a, b in fixed):
            raise Missing(
                f"{subject.name} takes images {list(shape)[1:]}: the images that come with this "
                f"package are {list(sizes)}, for zoo:tiny-vit and "
                "the zoo's LLaVAs. Judge other models by the task outputs, on images of "
                "your own with --data FOLDER"
            )


def shown(subject: Subject, setting: Setting) -> Exam:
    """Test images for a classifier; the class is the type."""
    pairs = list(scenes.classified("test", setting.samples or IMAGES, setting.seed, BATCH))
    return Exam(
        [{"pixel_values": pixels} for pixels, _ in pairs],
        [[(str(label), label) for label in labels.tolist()] for _, labels in pairs],
        sum(len(labels) for _, labels in pairs),
    )


def asked(subject: Subject, setting: Setting) -> Exam:
    """Test questions for a model of images and text."""
    return _batched(subject, _questions(subject, setting.samples or QUESTIONS, setting.seed))


def example_batch(subject: Subject, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of ``batch`` questions of one length, for timing."""
    questions = _questions(subject, 1) * batch
    return scenes.prompt_batches(questions, subject.tokenizer(), batch=batch)[0]


def _questions(subject: Subject, count: int, seed: int = 0) -> list[scenes.Question]:
    """Of the test split; those of ``details`` and of ``videos`` for a model that has their
    words."""
    if subject.tokenizer().token_to_id(details.WORD) is not None:
        return details.questions("test", count, seed)
    if of_videos(subject):
        return videos.questions("test", count, seed, frame_count(subject))
    return scenes.questions("test", count, seed, scene_size(subject))


def of_videos(subject: Subject) -> bool:
    """Whether a model has the words of questions about videos."""
    tokenizer = subject.tokenizer()
    return all(tokenizer.token_to_id(word) is not None for word in videos.WORDS)


def frame_count(subject: Subject) -> int:
    """Frames of the videos that a model takes."""
    shape = _pixels(subject)
    if len(shape) > 1 and isinstance(shape[1], int):
        return shape[1]
    tokens = read_json(subject.folder, "config.json").get("image_seq_length")
    return tokens // videos.PATCHES if isinstance(tokens, int) else videos.FRAMES


def _pixels(subject: Subject) -> tuple[Dim, ...]:
    """The shape of images as the graph takes them; none where there is no graph."""
    if subject.view is None:
        return ()
    types = map(subject.view.type, subject.view.inputs())
    return dict(zip(subject.view.input_names(), types, strict=True))["pixel_values"].shape or ()


def scene_size(subject: Subject) -> int:
    """Pixels along an edge of the scenes that a model of images and text is asked about: large ones
    where it takes crops."""
    if subject.view is not None:
        return scenes.LARGE if len(_pixels(subject)) == 5 else scenes.IMAGE
    tokens = read_json(subject.folder, "config.json").get("image_seq_length")
    return scenes.LARGE if tokens == scenes.CROPS * scenes.TOKENS else scenes.IMAGE


def _batched(subject: Subject, questions: Sequence[scenes.Question]) -> Exam:
    tokenizer = subject.tokenizer()
    batches: list[dict[str, torch.Tensor]] = []
    answers: list[list[tuple[str, int]]] = []
    lengths = [len(tokenizer.encode(question.text).ids) for question in questions]
    for length in sorted(set(lengths)):
        part = [q for q, n in zip(questions, lengths, strict=True) if n == length]
        batches += scenes.prompt_batches(part, tokenizer, batch=BATCH)
        right = [(q.type, tokenizer.token_to_id(q.answer)) for q in part]
        answers += [right[start : start + BATCH] for start in range(0, len(part), BATCH)]
    return Exam(batches, answers, len(questions))


def _check_words(subject: Subject) -> None:
    """The questions are written in the words of ``zoo:tiny-llava``'s tokenizer."""
    tokenizer = subject.tokenizer()
    needed = ("<image>", "<pad>", "yes", "no", "none", *map(str, range(10)))
    lacking = [word for word in needed if tokenizer.token_to_id(word) is None]
    if lacking:
        raise Missing(
            f"{subject.name}: its tokenizer lacks {', '.join(lacking)}: the questions that come "
            "with this package are for zoo:tiny-llava. Judge other models on your own questions by "
            "subject.run in Python, or by latency and memory here"
        )
