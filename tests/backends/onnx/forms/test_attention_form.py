"""Attention as an artifact spells it out: as torch computes it, without copies, and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.forms.attention_form import ShareKeys, SpellAttention
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.rewrite.driver import rewrite
from graphwright.ir.vocab.targets import PORTABLE

from ...held_to_torch import TOLERANCE, run

BATCH, HEADS, SHARED, ROWS, KEYS, WIDTH = 3, 6, 2, 5, 7, 8
attend = torch.nn.functional.scaled_dot_product_attention


def repeated(x: torch.Tensor, times: int = HEADS // SHARED) -> torch.Tensor:
    """As transformers repeats keys and values."""
    batch, heads, tokens, width = x.shape
    wide = x[:, :, None].expand(batch, heads, times, tokens, width)
    return wide.reshape(batch, heads * times, tokens, width)


def tiled(x: torch.Tensor) -> torch.Tensor:
    """All heads, one run of them after another."""
    batch, heads, tokens, width = x.shape
    wide = x[:, None].expand(batch, HEADS // SHARED, heads, tokens, width)
    return wide.reshape(batch, HEADS, tokens, width)


class Twice(torch.nn.Module):
    """Two attentions that share keys by ``repeat``, under one mask."""

    def __init__(self, repeat: Callable[[torch.Tensor], torch.Tensor] = repeated) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        once = attend(q, self.repeat(k), self.repeat(v), attn_mask=mask)
        return attend(once, self.repeat(k), self.repeat(v), attn_mask=mask)


def arguments(kind: str) -> tuple[torch.Tensor, ...]:
    """Of the first sample no query sees anything, of the second one does not."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, ROWS, WIDTH, generator=rng)
    k, v = (torch.randn(BATCH, SHARED, KEYS, WIDTH, generator=rng) for _ in range(2))
    mask = torch.rand(BATCH, 1, ROWS, KEYS, generator=rng) > 0.4
    mask[..., 0] = True
    mask[0] = mask[1, :, 2] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return q, k, v, mask


def spelled(args: tuple[torch.Tensor, ...], module: torch.nn.Module) -> onnx_ir.Model:
    sizes = [{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO} for _ in args]
    return lowered(trace(module, args, dynamic_shapes=tuple(sizes)), PORTABLE).model


def kinds(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_keys_are_shared_and_rows_that_see_nothing_are_found_once(kind: str) -> None:
    args = arguments(kind)
    expected = Twice()(*args)
    assert torch.equal(expected[0], torch.zeros(HEADS, ROWS, WIDTH))
    model = spelled(args, Twice())
    counts = kinds(model)
    assert (counts["Softmax"], counts["Expand"], counts["IsNaN"]) == (3, 0, 1)
    names = [value.name for value in model.graph.inputs]
    for optimize in (True, False):
        got = run(model, dict(zip(names, args, strict=True)), optimize=optimize)["output"]
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_row_is_looked_at_where_each_sees_itself() -> None:
    q, k, v, _ = arguments("bool")

    class Causal(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, is_causal=True, enable_gqa=True)

    model = spelled((q, k, v), Causal())
    assert (kinds(model)["Softmax"], kinds(model)["IsNaN"]) == (1, 0)
    got = run(model, {"q": q, "k": k, "v": v})["output"]
    torch.testing.assert_close(got, Causal()(q, k, v), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_what_is_written_is_read_back(kind: str) -> None:
    args = arguments(kind)
    model = spelled(args, Twice())
    view = OnnxView(model.clone())
    canonicalize(view)
    sites = [node for node in view.nodes() if view.op(node) == "sdpa"]
    assert len(sites) == 2 and not {"softmax", "isnan", "expand"} & {
        view.op(node) for node in view.nodes()
    }
    for site in sites:
        assert view.attrs(site)["gqa"]
        mask = view.type(view.tensor(site, 3))
        assert mask.dtype == args[3].dtype
        assert view.name(view.tensor(site, 3)) == "mask"
    assert kinds(lowered(view, PORTABLE).model) == kinds(model)


def widened(x: torch.Tensor) -> torch.Tensor:
    """Heads repeated, and the one sample for all samples."""
    wide = x[:1, :, None].expand(BATCH, SHARED, HEADS // SHARED, KEYS, WIDTH)
    return wide.reshape(BATCH, HEADS, KEYS, WIDTH)


@pytest.mark.parametrize(
    ("repeat", "reason"),
    [(tiled, "does more than repeat heads"), (widened, "does more than repeat heads")],
)
def test_other_repetitions_stay(repeat: Callable[..., Any], reason: str) -> None:
    args = arguments("bool")
    view = trace(Twice(repeat), args, dynamic_shapes={})
    report = rewrite(view, [ShareKeys()])
    assert not report.total and reason in report.refusals["share-keys"].reason
    inputs = dict(zip(view.input_names(), args, strict=True))
    got = run(lowered(view, PORTABLE).model, inputs)["output"]
    torch.testing.assert_close(got, Twice(repeat)(*args), rtol=TOLERANCE, atol=TOLERANCE)


def test_attention_without_heads_is_left_to_the_ops_own_form() -> None:
    q, k, v, mask = (x[:, 0] for x in arguments("bool"))

    class Flat(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
            return attend(q, k, v, attn_mask=mask)

    view = trace(Flat(), (q, k, v, mask), dynamic_shapes={})
    report = rewrite(view, [SpellAttention()])
    assert not report.total
    assert "only [batch, heads, tokens, width]" in report.refusals["spell-attention"].reason
    assert kinds(lowered(view, PORTABLE).model)["IsNaN"] == 1
