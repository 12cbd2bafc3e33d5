"""``zoo:tiny-vit``, the LLaVAs ``zoo:tiny-llava*`` and ``zoo:tiny-video``: trained by
``tools/zoo``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...fx.view import FxView
from ..hf.folder import load_folder
from . import details, videos
from .scenes import LARGE, Question, classified, prompt_batches, questions
from .text import read_tokenizer

VIT, LLAVA, LLAVA_NEXT, LLAVA_DETAILS, VIDEO = (
    Path(__file__).parent / name
    for name in ("tiny-vit", "tiny-llava", "tiny-llava-next", "tiny-llava-details", "tiny-video")
)
SAMPLE_COUNT = 32
SAMPLE_BATCH = 8


def load_tiny_vit(dtype: torch.dtype | None = None) -> FxView:
    """A vision transformer of 6 layers that names a digit, in f32 unless ``dtype`` says otherwise.

    Input ``pixel_values`` ``[batch, 3, 48, 48]``, output ``logits`` ``[batch, 10]``. ``samples``
    are 32 pictures of digits of the calibration split.
    """

    def samples() -> list[dict[str, torch.Tensor]]:
        batches = classified("calibration", SAMPLE_COUNT, batch=SAMPLE_BATCH)
        return [{"pixel_values": pixels} for pixels, _ in batches]

    return _load(VIT, dtype, samples)


def load_tiny_llava(dtype: torch.dtype | None = None, *, cache: bool = False) -> FxView:
    """A LLaVA that answers questions about scenes of digits, in f32 unless ``dtype`` is given.

    Inputs ``input_ids`` and ``attention_mask`` ``[batch, seq]`` i64, ``pixel_values``
    ``[batch, 3, 96, 96]``; a prompt holds 144 placeholders. Output ``logits`` ``[batch, seq, 36]``.
    ``samples`` are 32 questions of the calibration split.
    """

    def samples() -> list[dict[str, torch.Tensor]]:
        return _batches(LLAVA, questions("calibration", SAMPLE_COUNT))

    return _load(LLAVA, dtype, samples, cache)


def load_tiny_llava_next(dtype: torch.dtype | None = None, *, cache: bool = False) -> FxView:
    """``zoo:tiny-llava`` for scenes of twice the width, in f32 unless ``dtype`` is given.

    Inputs as there, with ``pixel_values`` ``[batch, 5, 3, 96, 96]``: a thumbnail and four quarters,
    of which each takes 144 of the 720 placeholders of a prompt. ``samples`` are 32 questions of the
    calibration split.
    """

    def samples() -> list[dict[str, torch.Tensor]]:
        return _batches(LLAVA_NEXT, questions("calibration", SAMPLE_COUNT, size=LARGE))

    return _load(LLAVA_NEXT, dtype, samples, cache)


def load_tiny_llava_details(
    dtype: torch.dtype | None = None, *, cache: bool = False
) -> FxView:
    """``zoo:tiny-llava`` for the questions of ``details``, which ask for all parts of a picture.

    Inputs as there; output ``logits`` ``[batch, seq, 37]``. ``samples`` are 32 questions of the
    calibration split.
    """

    def samples() -> list[dict[str, torch.Tensor]]:
        return _batches(LLAVA_DETAILS, details.questions("calibration", SAMPLE_COUNT))

    return _load(LLAVA_DETAILS, dtype, samples, cache)


def load_tiny_video(dtype: torch.dtype | None = None, *, cache: bool = False) -> FxView:
    """A LLaVA that answers questions about videos of digits, in f32 unless ``dtype`` is given.

    Inputs ``input_ids`` and ``attention_mask`` ``[batch, seq]`` i64, ``pixel_values``
    ``[batch, 8, 3, 48, 48]``: frames, of which each takes 36 of the 288 placeholders of a prompt.
    Output ``logits`` ``[batch, seq, 40]``. ``samples`` are 32 questions of the calibration split.
    """

    def samples() -> list[dict[str, torch.Tensor]]:
        return _batches(VIDEO, videos.questions("calibration", SAMPLE_COUNT))

    return _load(VIDEO, dtype, samples, cache)


def _batches(folder: Path, asked: Sequence[Question]) -> list[dict[str, torch.Tensor]]:
    return prompt_batches(asked, read_tokenizer(folder), batch=SAMPLE_BATCH)


def _load(
    folder: Path, dtype: torch.dtype | None, sampler: Callable[[], list[dict[str, torch.Tensor]]],
    cache: bool = False,
) -> FxView:  # fmt: skip
    name, precision = f"zoo:{folder.name}", dtype or torch.float32
    view = load_folder(folder, name=name, dtype=precision, cache=cache)

    def samples() -> list[dict[str, torch.Tensor]]:
        return [
            {n: t.to(precision) if t.is_floating_point() else t for n, t in batch.items()}
            for batch in sampler()
        ]

    view.source = dataclasses.replace(view.source, kind="zoo", sampler=samples)
    return view
