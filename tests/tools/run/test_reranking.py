"""Documents are ranked as in-context re-ranking does by the library's own attention."""

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
from graphwright.tools.run.reranking import DOCUMENT, QUESTION, Reranker

transformers: Any = importlib.import_module("transformers")
DOCUMENTS = [sentence[:30] for sentence in english_sentences(3)]
QUERY = "What is a statement"
SHORT = "rerank-by-attention{queries=16}"


def by_library(folder: Path) -> dict[int, float]:
    """Scores of the documents by two calls of the whole model, all attention returned."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = read_tokenizer(folder)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    start: list[int] = tokenizer.encode("").ids
    pieces = [ids(DOCUMENT.format(number=i + 1, document=d)) for i, d in enumerate(DOCUMENTS)]
    text = [*start, *(token for piece in pieces for token in piece)]
    rows = []
    for query in (f" {QUERY}", " N/A"):
        prompt = torch.tensor([[*text, *ids(QUESTION), *ids(query)]])
        with torch.no_grad():
            maps = model(prompt, output_attentions=True).attentions
        paid = torch.stack(maps).mean((0, 1, 2))[-len(ids(query)) :].mean(0)
        rows.append(paid[len(start) : len(text)])
    scores = rows[0] - rows[1]
    scores[scores < scores.mean() - 2 * scores.std()] = 0
    return {i: float(part.sum()) for i, part in enumerate(scores.split(list(map(len, pieces))))}


def test_the_order_of_documents(
    language_model: Path, publish: Callable[..., Path], command: Any, tmp_path: Path
) -> None:
    expected = by_library(language_model)
    order = sorted(expected, key=lambda place: -expected[place])
    out = publish(language_model, SHORT)
    plain = gw.optimize(gw.load(language_model, cache=False), SHORT).graph
    for ranker in (Reranker(out), Reranker(gw.compile(plain), language_model)):
        ranked = ranker(QUERY, DOCUMENTS)
        assert [one.place for one in ranked] == order
        for one in ranked:
            assert one.score == pytest.approx(expected[one.place], rel=1e-3, abs=1e-6)
    check_the_command(out, order, command, tmp_path)
    for query, documents, message in (
        (" ", DOCUMENTS, "the query is empty"),
        (QUERY, [], "there are no documents"),
        (QUERY, ["a", ""], "a document is empty"),
        (QUERY, DOCUMENTS * 40, "rank fewer or shorter documents"),
        ("of" * 20, DOCUMENTS[:1], r"queries=\d+\} or more"),
    ):
        with pytest.raises(BadInput, match=message):
            Reranker(out)(query, documents)
    with pytest.raises(BadInput, match="no attention: make the artifact with the pass"):
        Reranker(gw.compile(gw.load(language_model, cache=False)), language_model)


def check_the_command(out: Path, order: list[int], command: Any, folder: Path) -> None:
    """It prints the same order, of lines and of JSON lines, and says what is wrong."""
    lines, empty = folder / "documents.txt", folder / "empty.txt"
    json_lines = folder / "documents.jsonl"
    lines.write_text("\n\n".join(DOCUMENTS) + "\n")
    json_lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    empty.write_text("\n")
    for file in (lines, json_lines):
        code, printed, _ = command("rerank", str(out), "--query", QUERY, "--documents", str(file))
        rows = [line.split("\t") for line in printed.splitlines()[-len(order) :]]
        assert code == 0 and [int(number) - 1 for _, number, _ in rows] == order
        assert [text for *_, text in rows] == [" ".join(DOCUMENTS[i].split()) for i in order]
        assert sorted((float(score) for score, *_ in rows), reverse=True) == [
            float(score) for score, *_ in rows
        ]
    for artifact, file, expected, message in (
        (out, empty, 2, "empty.txt: empty: it holds no document"),
        (out, folder / "none.txt", 2, "none.txt: No such file or directory"),
        (folder / "none", lines, 3, "none is not there: give an artifact's folder"),
    ):
        code, _, err = command("rerank", str(artifact), "--query", QUERY, "--documents", str(file))
        assert code == expected and message in err, err
