"""``--calib`` of two texts a line: a pair for what classifies pairs, two texts for the others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.zoo.text import read_tokenizer
from graphwright.tools.cli import terminal
from graphwright.tools.data.calibration import Calibration, read
from graphwright.tools.data.text import cut_pair, read_samples
from graphwright.tools.report.manifest import Manifest
from rich.console import Console

from .conftest import jsonl

ASKED = [("a b c", "d e"), ("b", "c d e a b")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[View, Any]:
    """A classifier as BERT's, and the library's own tokenizer of its folder."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    held = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(held)}))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return load(folder), tokenizer


@pytest.mark.parametrize("name", ["a.jsonl", "a.TSV"])
def test_a_classifier_reads_pairs_as_its_tokenizer_joins_them(
    tmp_path: Path, model: tuple[View, Any], name: str, make_manifest: Any
) -> None:
    view, tokenizer = model
    jsonl(tmp_path / "a.jsonl", *({"sentence1": a, "sentence2": b, "label": 1} for a, b in ASKED))
    rows = "\n".join("\t".join(texts) for texts in [("sentence1", "sentence2"), *ASKED])
    (tmp_path / "a.TSV").write_text(rows)
    data = read(str(tmp_path / name), view)
    (batch,) = data.batches
    # The longest stands first.
    expected = tokenizer([a for a, _ in ASKED[::-1]], [b for _, b in ASKED[::-1]], padding=True,
                         return_tensors="pt")  # fmt: skip
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[key], expected[key]), key
    assert "2 samples, 2 of them pairs of texts, " in _said(make_manifest("quantize"), data)


def _said(manifest: Manifest, data: Calibration) -> str:
    manifest.calibration = data.entry()
    console = Console(file=io.StringIO(), width=200)
    terminal.print_costs(console, manifest)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_other_models_read_each_text_by_itself(
    tmp_path: Path, llama: View, model: tuple[View, Any]
) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"text": "The quick brown fox", "text_pair": "jumps over"})
    read_ = read(data, llama)
    assert (read_.entry().samples, read_.pairs) == (2, 0)
    with pytest.raises(BadInput, match=r"a\.jsonl holds pairs of texts"):
        read(data, model[0], windows="joined")


def test_pairs_by_their_names_unless_a_line_says_all_that_it_holds(tmp_path: Path) -> None:
    beside = {"question": "q", "context": "c"}
    data = jsonl(tmp_path / "a.jsonl", beside, {"prompt": "p", "completion": " c"} | beside,
                 {"#1 String": "a", "#2 String": "b"}, {"query": "q", "passage": "p"})  # fmt: skip
    assert read_samples(Path(data)) == [("q", "c"), "p c", ("a", "b"), ("q", "p")]
    with pytest.raises(BadInput, match=r"line 1: is a list, and each line of the file is an obj"):
        read_samples(Path(jsonl(tmp_path / "b.jsonl", [{"text": "a"}])))


@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("words", [(90, 70), (70, 90), (90, 2), (80, 80)], ids=str)
def test_long_pairs_are_cut_without_all_that_is_cut_off(
    model: tuple[View, Any], words: tuple[int, int], length: int
) -> None:
    """As the library cuts them, but not with every window of the one beside all of the other."""
    pair = ("a b " * words[0], "c d e " * words[1])
    expected = model[1](*pair, truncation=True, max_length=length)["input_ids"]
    tokenizer = read_tokenizer(Path(model[0].source.folder or ""))
    tokenizer.enable_truncation(length)
    row = tokenizer.encode(*cut_pair(tokenizer, pair, length))
    assert row.ids == expected and len(row.overflowing) < 200


def test_one_text_of_a_classifier_is_no_pair(tmp_path: Path, model: tuple[View, Any]) -> None:
    data = read(jsonl(tmp_path / "a.jsonl", {"sentence": "a b", "label": 0}), model[0])
    assert data.batches[0]["input_ids"].tolist() == [[1, 3, 4, 2]] and data.pairs == 0


def test_shorter_texts_of_a_decoder_are_filled_up_with_its_own_token(
    tmp_path: Path, language_model: Path
) -> None:
    """Where a text ends, a classifier on a decoder sees by that token."""
    import shutil

    import transformers
    from graphwright.tools.evaluate.sentences import encoded
    from graphwright.tools.evaluate.subject import Subject

    shutil.copy(language_model / "tokenizer.json", tmp_path)
    config = transformers.Qwen2Config(
        vocab_size=4096, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16, pad_token_id=5, num_labels=3,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    texts = ["The quick brown fox jumps over the lazy dog", "A fox"]
    subject = Subject.of(tmp_path)
    assert subject.view is not None
    (asked,) = encoded(subject, texts)
    calibrating = read(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts)), subject.view)
    rows = [subject.tokenizer().encode(text).ids for text in texts]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])).logits for row in rows])
    for inputs in (asked.inputs, calibrating.batches[0]):
        torch.testing.assert_close(subject.run(inputs)["logits"], alone)
