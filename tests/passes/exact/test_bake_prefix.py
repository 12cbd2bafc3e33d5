"""A text behind a baked prefix is the library's own text behind it, in one call and in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.trace import trace
from graphwright.passes.base import Context
from graphwright.passes.exact.bake_prefix import BakePrefix

from ... import models as small_models

PREFIX = [5, 17, 60, 2, 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    small = small_models.llama()
    folder = tmp_path_factory.mktemp("llama")
    small.module.model.save_pretrained(folder)
    fx = load(folder, cache=True)
    return small.module.model, {"fx": fx, "onnx": translated(fx)}


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_a_prefix_lies_in_the_model(llama: Any, kind: str) -> None:
    model, graphs = llama
    done = gw.optimize(graphs[kind], "bake-prefix{tokens=[5 17 60 2 9]}")
    (site,) = done.report.passes[0].result.sites
    assert site.bytes_after == 2 * 2 * 5 * 2 * 8 * 4, "layers, parts, tokens, heads, width, bytes"
    run = gw.compile(done.graph, backend="onnxruntime")
    texts = [[33, 4, 8, 21], [7, 1]]
    ids = torch.tensor([texts[0][:3], [0, *texts[1]]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    outputs = run(input_ids=ids, attention_mask=mask)
    steps = [outputs["logits"][:, -1]]
    for token in ([21, 3], [50, 50]):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        past = {n.replace("present", "past_key_values"): t for n, t in outputs.items()
                if n != "logits"}  # fmt: skip
        assert {t.shape[2] for t in past.values()} == {mask.shape[1] - 1}
        outputs = run(input_ids=torch.tensor(token)[:, None], attention_mask=mask, **past)
        steps.append(outputs["logits"][:, -1])
    for row, text in enumerate(([33, 4, 8, 21, 50], [7, 1, 3, 50])):
        with torch.no_grad():
            expected = model(torch.tensor([PREFIX + text])).logits[0, -3:]
        torch.testing.assert_close(torch.stack(steps)[:, row], expected, rtol=1e-4, atol=1e-5)


def test_bad_input(llama: Any, tmp_path: Path) -> None:
    _, graphs = llama
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for recipe, message in (
        ("bake-prefix", "give text=FILE or tokens"),
        ("bake-prefix{text=FILE tokens=[1]}", "give text=FILE or tokens"),
        ("bake-prefix{text=none.txt}", "there is no such file"),
        (f"bake-prefix{{text={tmp_path}/latin.txt}}", "latin.txt: not UTF-8"),
        ("bake-prefix{tokens=[5 97]}", "97"),
        ("quantize{bits=8 group=0},bake-prefix{tokens=[5]}", "put bake-prefix first"),
    ):
        with pytest.raises(BadInput, match=message):
            gw.optimize(graphs["fx"], recipe)
    plain = trace(torch.nn.Embedding(7, 4), (torch.ones(1, 3, dtype=torch.int64),))
    with pytest.raises(BadInput, match="lies in a key-value cache, and the graph has none"):
        BakePrefix(tokens=("5",)).plan(Context(plain))
