"""Greedy answers of an encoder-decoder's exported parts, each in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from ...backends.artifacts.artifact import PAIR_FILES
from ...backends.base import Executable
from ...backends.registry import compile as compile_model
from ...ir.core.errors import Missing


class Seq2Seq:
    """The three parts that ``export_pair`` wrote. ``Missing`` where one is not there."""

    def __init__(self, folder: str | Path) -> None:
        self._runs: dict[str, Executable] = {}
        for part, name in PAIR_FILES.items():
            path = Path(folder) / name
            if not path.is_file():
                raise Missing(f"{path}: no such file; export_pair writes the parts of a model")
            self._runs[part] = compile_model(path)

    def greedy(
        self, source: Mapping[str, torch.Tensor], start: int, *, max_new_tokens: int,
        eos: Collection[int] = (), pad: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Most likely tokens one after another, ``[batch, 1 + new]`` i64, ``start`` first.

        ``source`` is what the encoder takes: ``input_ids`` and ``attention_mask``, or
        ``input_features``. A row that wrote a token of ``eos`` goes on with ``pad``, and the loop
        ends with the last row.
        """
        hidden = self._runs["encoder"](**source)["last_hidden_state"]
        text = torch.full((len(hidden), 1), start)
        masked = {"encoder_attention_mask": source["attention_mask"]} if (
            "encoder_attention_mask" in self._runs["decoder"].input_names
        ) else {}  # fmt: skip
        outputs = self._runs["decoder"](input_ids=text, encoder_hidden_states=hidden, **masked)
        past: dict[str, torch.Tensor] = {}
        ended = torch.zeros(len(text), dtype=torch.bool)
        ends = torch.tensor(sorted(eos), dtype=torch.int64)
        for _ in range(max_new_tokens):
            past |= {n.replace("present", "past_key_values"): t for n, t in outputs.items()
                     if n.startswith("present")}  # fmt: skip
            token = torch.where(ended, pad, outputs["logits"][:, -1].argmax(-1))
            text = torch.cat([text, token.unsqueeze(1)], 1)
            ended |= torch.isin(token, ends)
            if bool(ended.all()) or text.shape[1] > max_new_tokens:
                break
            outputs = self._runs["decoder_with_past"](input_ids=text[:, -1:], **masked, **past)
        return text
