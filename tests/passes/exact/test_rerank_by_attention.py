"""Attention as an answer is the library's own, in one call and behind a cache, and late blocks, the
head and what they hold are gone."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.structure.recognize import recognize

from ... import models as small_models

LAYERS, LAST = 4, 2
TEXTS = torch.tensor([[5, 17, 60, 2, 9, 33, 8, 21], [0, 0, 7, 1, 3, 50, 4, 96]])
MASK = torch.tensor([[1] * 8, [0, 0, *[1] * 6]])


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    small = getattr(small_models, request.param)(LAYERS).module.model
    folder = tmp_path_factory.mktemp(request.param)
    small.save_pretrained(folder)
    small.set_attn_implementation("eager")
    fx = load(folder, cache=True)
    return small, {"fx": fx, "onnx": translated(fx)}


def library(model: Any, blocks: slice) -> torch.Tensor:
    """The mean over heads and blocks, ``[batch, queries, tokens]``."""
    with torch.no_grad():
        done = model(TEXTS, attention_mask=MASK, output_attentions=True)
    return torch.stack(done.attentions[blocks]).mean((0, 2))


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_librarys_attention(model: Any, kind: str) -> None:
    small, graphs = model
    done = gw.optimize(graphs[kind], f"rerank-by-attention{{blocks=1-{LAST} queries=3}}")
    (step,) = done.report.passes
    assert done.truth.by == "the graph before the special case" and len(done.truth.probes) == 3
    assert 0 < step.errors["attention"].rel_l2 < 1e-6, "computed by other nodes, and as close"
    weights, linears = done.graph.weights(), recognize(done.graph).linears
    assert {"q", "down"} <= {linear.role for linear in linears} and "head" not in {
        linear.role for linear in linears
    }
    late = (f"layers.{LAST + 1}.", f"layers.{LAST}.mlp", f"layers.{LAST}.self_attn.o")
    assert not [name for name in weights for part in late if part in name]
    assert step.bytes_after < step.bytes_before
    caches = [name for name in done.graph.input_names() if name.endswith(".key")]
    assert caches == [f"past_key_values.{i}.key" for i in range(LAST + 1)]
    expected = library(small, slice(1, LAST + 1))[:, -3:]
    run = gw.compile(done.graph, backend="onnxruntime")
    whole = run(input_ids=TEXTS, attention_mask=MASK)["attention"]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
    outputs = run(input_ids=TEXTS[:, :6], attention_mask=MASK[:, :6])
    past = {n.replace("present", "past_key_values"): t for n, t in outputs.items()
            if n != "attention"}  # fmt: skip
    behind = run(input_ids=TEXTS[:, 6:], attention_mask=MASK, **past)["attention"]
    assert torch.equal(behind[:, 0], behind[:, 1]), "of fewer tokens the first row is repeated"
    torch.testing.assert_close(behind[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_all_blocks_and_all_rows(model: Any) -> None:
    small, graphs = model
    done = gw.optimize(graphs["fx"], "rerank-by-attention{queries=0},quantize{bits=8 group=0}")
    exact, rounded = (step.errors["attention"].rel_l2 for step in done.report.passes)
    assert exact < 1e-6 < rounded < 0.05
    rows = gw.compile(done.standard)(input_ids=TEXTS, attention_mask=MASK)["attention"]
    torch.testing.assert_close(rows, library(small, slice(0, LAYERS)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_bad_input(model: Any) -> None:
    graph = model[1]["fx"]
    for recipe, message in (
        ("rerank-by-attention{queries=-1}", "queries=-1 must be at least 0"),
        ("rerank-by-attention{blocks=2-4}", "there is no block 4; there are 0 to 3"),
        ("rerank-by-attention{blocks=1.mlp}", "whole blocks have attention"),
        ("rerank-by-attention{blocks=x}", "'x' is not a block"),
        ("drop-blocks{count=1 score=random},rerank-by-attention", "put rerank-by-attention first"),
        ("rerank-by-attention,rerank-by-attention", "gives logits, whose place attention takes"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(graph, recipe)
