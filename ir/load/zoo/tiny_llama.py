"""``zoo:tiny-llama``: a small language model, trained by ``tools/zoo/train_llama.py``."""

from __future__ import annotations

import dataclasses

import torch

from ...fx.view import FxView
from ..hf.folder import load_folder
from .text import SHIPPED, read_tokenizer, shipped_text, token_batches

SAMPLE_COUNT = 32
SAMPLE_BATCH = 8
SAMPLE_TOKENS = 128


def load_tiny_llama(dtype: torch.dtype | None = None, *, cache: bool = False) -> FxView:
    """A Llama of 10 layers on English documentation, in f32 unless ``dtype`` says otherwise.

    Inputs ``input_ids`` and ``attention_mask``, ``[batch, seq]`` i64, seq up to 512; output
    ``logits`` ``[batch, seq, 4096]``. The weights are stored in bf16. ``samples`` are 32 texts of
    the calibration split, 128 tokens each.
    """
    dtype = dtype or torch.float32
    view = load_folder(SHIPPED, name="zoo:tiny-llama", dtype=dtype, cache=cache)
    view.source = dataclasses.replace(view.source, kind="zoo", sampler=_samples)
    return view


def verifying_texts() -> list[str]:
    """The texts of ``samples``: none of them is for calibration."""
    return [text for text in shipped_text("calibration") if len(text) > 800][:SAMPLE_COUNT]


def _samples() -> list[dict[str, torch.Tensor]]:
    return token_batches(
        read_tokenizer(SHIPPED), verifying_texts(), batch=SAMPLE_BATCH, longest=SAMPLE_TOKENS,
        left=True,
    )  # fmt: skip
