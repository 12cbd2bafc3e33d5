"""One call that reads a tree says behind each token what the library's model does behind its line;
without the mask nothing changes."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.backends.generation.drafts import Guess
from graphwright.backends.generation.text_calls import cache_of, called
from graphwright.backends.onnx.forms.row_places import Places
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.structure.tree_input import TREE, TREE_KEY, tree_mask
from graphwright.passes.base import Context
from graphwright.passes.exact.tree_mask import TreeMask

from .... import models as small_models

TEXT = [5, 17, 60, 2]
TREE_OF = Guess((8, 9, 8, 30, 9, 4), (0, 0, 1, 1, 2, 4))
"""8 and 9 behind the text; 8 and 30 behind that 8, 9 behind the 9, 4 behind 30."""


def test_the_mask_of_a_tree() -> None:
    assert TREE_OF.depths == [1, 1, 2, 2, 2, 3] and not TREE_OF.is_line
    assert TREE_OF.child(0, 9) == 2 and TREE_OF.child(2, 8) is None
    mask = tree_mask((0, 0, 1), 2)
    assert mask.shape == (4, 6) and mask[:, :3].all()
    assert (~mask).nonzero().tolist() == [[2, 3], [3, 4]]


def branches() -> list[list[int]]:
    """For each row of the call the tokens from the root on that lead to it."""
    rows: list[list[int]] = [[]]
    for token, parent in zip(TREE_OF.tokens, TREE_OF.parents, strict=True):
        rows.append([*rows[parent], token])
    return rows


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tree_is_the_lines_that_it_is_made_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = getattr(small_models, name)()
    small.module.model.save_pretrained(tmp_path / "model")
    graph = load(tmp_path / "model", cache=True)
    canonicalize(graph)
    bare = gw.compile(graph)
    graph.metadata()[TREE_KEY] = "true"
    written = lowered(graph)
    run = gw.compile(written)
    with monkeypatch.context() as patched:
        patched.setattr(Places, "window", lambda *_: 4)
        with pytest.raises(BadInput, match=r"tree-mask: .*sees a window of 4 keys"):
            lowered(graph)
    assert TREE_KEY in written.metadata() and TREE not in written.input_names()
    assert [str(value.name) for value in written.model.graph.inputs].count(TREE) == 1
    prompt = {"input_ids": torch.tensor([[0, 0, 7], TEXT[:3]]),
              "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])}  # fmt: skip
    for one, other in zip(run(**prompt).values(), bare(**prompt).values(), strict=True):
        assert torch.equal(one, other), "left out, the mask changes nothing"
    cache = cache_of(run, called(run, TEXT, {}), len(TEXT) - 1)
    outputs = called(run, TEXT, cache, TREE_OF)
    for row, line in enumerate(branches()):
        ids = torch.tensor([TEXT + line])
        with torch.no_grad():
            expected = small.module.model(ids, use_cache=False).logits[0, -1]
        torch.testing.assert_close(outputs["logits"][0, row], expected, rtol=1e-4, atol=1e-4)
    taken = [1, 4, 6]  # the rows of 8, 30 and 4
    grown = cache_of(run, outputs, len(TEXT), [len(TEXT) - 1 + row for row in taken])
    again = called(run, [*TEXT, 8, 30, 4, 11], grown)["logits"]
    with torch.no_grad():
        expected = small.module.model(torch.tensor([[*TEXT, 8, 30, 4, 11]])).logits[0, -1]
    torch.testing.assert_close(again[0, -1], expected, rtol=1e-4, atol=1e-4)


def test_without_a_cache_there_is_nothing_to_read_behind() -> None:
    plain = trace(torch.nn.Embedding(7, 4), (torch.ones(1, 3, dtype=torch.int64),))
    with pytest.raises(BadInput, match="read behind a key-value cache, and the graph has none"):
        TreeMask().plan(Context(plain))
