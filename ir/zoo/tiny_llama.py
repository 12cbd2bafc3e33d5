"""``zoo:tiny-llama``: a small language model, trained by ``tools/zoo/train_llama.py``."""

from __future__ import annotations

import dataclasses

import torch

from ..fx import FxView
from ..load_hf import load_folder
from .text import SHIPPED, read_tokenizer, shipped_text, token_batches

SAMPLE_COUNT = 32
SAMPLE_BATCH = 8
SAMPLE_TOKENS = 128


def load_tiny_llama(dtype: torch.dtype | None = None) -> FxView:
    """A Llama of 10 layers on English documentation, in f32 unless ``dtype`` says otherwise.

    Inputs ``input_ids`` and ``attention_mask``, ``[batch, seq]`` i64, seq up to 512; output
    ``logits`` ``[batch, seq, 4096]``. The weights are stored in bf16. ``samples`` are 32 texts of
    the calibration split, 128 tokens each.
    """
    view = load_folder(SHIPPED, name="zoo:tiny-llama", dtype=dtype or torch.float32)
    view.source = dataclasses.replace(view.source, kind="zoo", sampler=_samples)
    return view


def _samples() -> list[dict[str, torch.Tensor]]:
    texts = shipped_text("calibration")
    chosen = [text for text in texts if len(text) > 800][:SAMPLE_COUNT]
    return token_batches(
        read_tokenizer(SHIPPED), chosen, batch=SAMPLE_BATCH, longest=SAMPLE_TOKENS, left=True
    )
