"""The modules of sentence-transformers behind a model, each by its formula written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.tools.evaluate.sentence_head import SentenceHead
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

TOKENS = torch.tensor([[1.0, 3.0, 99.0], [1.0, 9.0, 7.0]])[:, :, None]
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def modules(folder: Path, *kinds: str) -> Path:
    """``modules.json`` of a transformer and these behind it, by their class in old releases."""
    named = [("Transformer", ""), *((k, f"{n}_{k}") for n, k in enumerate(kinds, 1))]
    write(folder, "modules.json", [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(named)
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls", [1.0, 1.0]), ("lasttoken", [3.0, 7.0]), ("max", [3.0, 9.0]),
        ("mean", [2.0, 17 / 3]), ("mean_sqrt_len_tokens", [4 / math.sqrt(2), 17 / math.sqrt(3)]),
        ("weightedmean", [7 / 3, (1 + 18 + 21) / 6]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("old", [True, False])
def test_pooling(tmp_path: Path, mode: str, expected: list[float], old: bool) -> None:
    keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens",
            "weightedmean": "weightedmean_tokens"}  # fmt: skip
    write(tmp_path, "1_Pooling/config.json",
          {f"pooling_mode_{keys.get(mode, mode)}": True} if old else {"pooling_mode": mode})
    made = SentenceHead.of(tmp_path).vectors(TOKENS, MASK)
    torch.testing.assert_close(made[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_several_poolings_stand_one_behind_the_other(tmp_path: Path) -> None:
    write(tmp_path, "1_Pooling/config.json",
          {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    assert SentenceHead.of(tmp_path).vectors(TOKENS, MASK)[0].tolist() == [1.0, 2.0]
    assert SentenceHead.of(None).vectors(TOKENS, MASK)[0].tolist() == [2.0]


def test_dense_and_norm_are_run_behind_the_pooling(tmp_path: Path) -> None:
    modules(tmp_path, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
    write(tmp_path, "2_Dense/config.json",
          {"in_features": 2, "out_features": 3, "bias": True,
           "activation_function": "torch.nn.modules.activation.Tanh"})  # fmt: skip
    torch.manual_seed(0)
    weight, bias, scale, shift = torch.randn(3, 2), torch.randn(3), torch.randn(3), torch.randn(3)
    save_file(
        {"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense/model.safetensors"
    )
    (tmp_path / "3_LayerNorm").mkdir()
    torch.save({"norm.weight": scale, "norm.bias": shift},
               tmp_path / "3_LayerNorm/pytorch_model.bin")  # fmt: skip
    tokens = torch.randn(2, 3, 2)
    y = torch.tanh(tokens[1].mean(0) @ weight.T + bias)
    y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt() * scale + shift
    made = SentenceHead.of(tmp_path).vectors(tokens, MASK)[1]
    torch.testing.assert_close(made.float(), y / y.norm())


def test_prompts_lengths_and_letters(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"query": 0, ":": 1}, unk_token="query"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["[CLS]", "[SEP]"])
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    write(tmp_path, "config_sentence_transformers.json",
          {"prompts": {"q": "Query: "}, "default_prompt_name": "q"})
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": True})
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    head = SentenceHead.of(tmp_path)
    assert (head.text("A Cat"), head.longest, head.skipped(words)) == ("query: a cat", 64, 3)
    assert head.vectors(TOKENS, MASK, 1)[:, 0].tolist() == [3.0, 8.0]
    assert SentenceHead.of(tmp_path, inside=True).modules == ()
    write(tmp_path, "sentence_bert_config.json", {})
    write(tmp_path, "tokenizer_config.json", {"model_max_length": 32})
    assert SentenceHead.of(tmp_path).longest == 32


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"models\.LSTM is not one of the modules .* Pooling, Dense"):
        SentenceHead.of(modules(tmp_path, "Pooling", "LSTM"))
    with pytest.raises(Missing, match=r"2_Dense: holds no model\.safetensors"):
        SentenceHead.of(modules(tmp_path, "Pooling", "Dense"))
    save = {"linear.weight": torch.ones(1, 1)}
    write(tmp_path, "2_Dense/config.json", {"activation_function": "mine.Act"})
    save_file(save, tmp_path / "2_Dense/model.safetensors")
    with pytest.raises(BadInput, match=r"activation_function is mine\.Act"):
        SentenceHead.of(tmp_path)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode": ["mean", "median"]})
    with pytest.raises(BadInput, match=r"median.*; there are cls, max"):
        SentenceHead.of(modules(tmp_path, "Pooling"))
    with pytest.raises(BadInput, match="a vector for each token"):
        SentenceHead.of(modules(tmp_path)).vectors(TOKENS, MASK)
