"""A model for one text and for some answers: exact on what remains, in files that fit together."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.zoo.text import english_sentences, read_tokenizer

transformers: Any = importlib.import_module("transformers")
SENTENCES = english_sentences(6)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "domain.txt"
    path.write_text("\n".join(SENTENCES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(language_model: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()


def test_a_trimmed_vocabulary(
    language_model: Path, text: Path, model: Any, publish: Callable[..., Path]
) -> None:
    out = publish(language_model, f"vocabulary{{text={text}}}")
    whole, trimmed = read_tokenizer(language_model), read_tokenizer(out)
    done = json.loads((out / "graphwright.json").read_text())
    config = json.loads((out / "config.json").read_text())
    count = trimmed.get_vocab_size()
    assert count == config["vocab_size"] < whole.get_vocab_size()
    (step,) = done["passes"]
    assert [site["shape"][0] for site in step["sites"]] == [count, count]
    run = gw.compile(out)
    pieces = [trimmed.id_to_token(i) for i in range(count)]
    staying = torch.tensor([whole.token_to_id(piece) for piece in pieces])
    for sentence in SENTENCES:
        ids = torch.tensor([trimmed.encode(sentence).ids])
        old = torch.tensor([whole.encode(sentence).ids])
        assert torch.equal(staying[ids], old)
        with torch.no_grad():
            expected = model(old).logits[..., staying]
        logits = run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    strange = "Ångström 漢字"
    assert trimmed.decode(trimmed.encode(strange).ids) == strange
    assert gw.generate(out, SENTENCES[0][:20], max_new_tokens=4)[0].ids[0] < count


def test_a_head_of_some_answers(
    language_model: Path, model: Any, publish: Callable[..., Path]
) -> None:
    tokenizer = read_tokenizer(language_model)
    word = tokenizer.token_to_id("Ġthe")
    recipe = "restrict-head{tokens=[Ġthe 3-5 7]},quantize{bits=8 group=32 kinds=[q]}"
    out = publish(language_model, recipe)
    ids = torch.tensor([tokenizer.encode(SENTENCES[0]).ids])
    with torch.no_grad():
        expected = model(ids).logits[..., [word, 3, 4, 5, 7]]
    logits = gw.compile(out)(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    graph = gw.load(out)
    assert graph.metadata()["graphwright.head_tokens"] == f"[{word}, 3, 4, 5, 7]"
    assert set(gw.generate(out, SENTENCES[0], max_new_tokens=5)[0].ids) <= {word, 3, 4, 5, 7}
    exact, rounded = json.loads((out / "graphwright.json").read_text())["passes"]
    assert exact["error"]["rel_l2"] < 1e-6 < rounded["error"]["rel_l2"]


def test_bad_input(language_model: Path, text: Path, tmp_path: Path) -> None:
    graph = gw.load(language_model, cache=False)
    (tmp_path / "empty.txt").write_text(" \n")
    for recipe, message in (
        ("restrict-head{tokens=[700]}", "there is no token 700: lm_head has rows 0 to 699"),
        ("restrict-head{tokens=[extraordinarily]}", "is 7 tokens"),
        ("restrict-head{tokens=[3 1-3]}", "the token 3 is named twice"),
        (f"vocabulary{{text={tmp_path}/empty.txt}}", "it holds no word to keep"),
        (f"vocabulary{{text={tmp_path}/none.txt}}", "there is no such file"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(graph, recipe)
    data = [{"input_ids": torch.arange(20).view(1, 20) + 600,
             "attention_mask": torch.ones(1, 20, dtype=torch.int64)}]  # fmt: skip
    with pytest.raises(BadInput, match=r"data is of another case \(batch 1\): the token \d+ of it"):
        gw.optimize(graph, f"vocabulary{{text={text}}},wanda{{sparsity=0.5}}", calibration=data)
