"""A tokenizer's files for onnxruntime-genai: completed where they are silent, judged where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graphwright.backends.artifacts import genai_pictures
from graphwright.backends.artifacts.genai_pictures import write_genai
from graphwright.backends.artifacts.genai_words import settle_words
from graphwright.ir.vocab.targets import CPU, GENAI

BPE: dict[str, Any] = {
    "model": {"type": "BPE"},
    "added_tokens": [{"id": 7, "content": "<s>"}, {"id": 9, "content": "</s>"}],
}


def write(folder: Path, tokenizer: Any, config: Any) -> None:
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("config", [None, {"bos_token": "<s>", "chat_template": "x"}])
def test_a_class_is_named_where_none_is(config: dict[str, Any] | None, tmp_path: Path) -> None:
    """With the words that begin and end a text: the runtime puts the first before one by it."""
    write(tmp_path, BPE, config)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [11, 9]}')
    (said,) = settle_words(tmp_path)
    assert "names a tokenizer_class now, PreTrainedTokenizerFast" in said
    made = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ends = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    assert made == {**(config or {}), **ends}


@pytest.mark.parametrize(("tokenizer", "config", "said"), [
    (BPE, {"tokenizer_class": "LlamaTokenizerFast"}, None),
    (BPE | {"normalizer": {"type": "Prepend"}}, {"tokenizer_class": "LlamaTokenizer"}, None),
    (BPE, {"tokenizer_class": "CohereTokenizer"},
     "does not know the tokenizer_class CohereTokenizer. With PreTrainedTokenizerFast in"),
    (BPE | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
     {"tokenizer_class": "Qwen2Tokenizer"}, "normalizes texts (NFC), which onnxruntime-genai does"),
    ({"model": {"type": "Unigram"}}, None, "tokenizer_class None. With T5Tokenizer in"),
    ({"model": {"type": "WordLevel"}}, None, "only tokens: tokenizer.json is a WordLevel, not a"),
    (None, None, "only tokens: there is no tokenizer.json"),
])  # fmt: skip
def test_what_it_reads_otherwise_is_said(
    tokenizer: Any, config: Any, said: str | None, tmp_path: Path
) -> None:
    write(tmp_path, tokenizer, config)
    lines = settle_words(tmp_path)
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
    path = tmp_path / "tokenizer_config.json"
    assert (json.loads(path.read_text()) if path.is_file() else None) == config


def test_words_are_spoken_of_where_that_runtime_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(onnx: object, folder: Path, target: object) -> bool:
        (folder / "genai_config.json").touch()
        return True

    monkeypatch.setattr(genai_pictures, "write_genai_config", written)
    graph: Any = None
    assert not write_genai(graph, graph, tmp_path, CPU)
    assert "there is no tokenizer.json" in write_genai(graph, graph, tmp_path, GENAI)[0]
