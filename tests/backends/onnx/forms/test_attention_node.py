"""Attention without a cache as one node of opset 23: as torch computes it, and read back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import graphwright as gw
import onnx
import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.forms.attention_node import UseAttention, takes_opset
from graphwright.backends.onnx.forms.empty_sizes import never_none
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View, is_value
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.rewrite.driver import rewrite
from torch import Tensor
from torch.export import Dim

from ...held_to_torch import TOLERANCE, run

ROWS, TOKENS, HEADS, SHARED, WIDTH = 3, 5, 4, 2, 8
LOWEST = torch.finfo(torch.float32).min
attend = torch.nn.functional.scaled_dot_product_attention
KINDS = ("free", "keys", "pairs", "added", "lowest", "causal", "causal keys", "grouped", "wide")


class Attentions(torch.nn.Module):
    """An attention of each kind, of heads that lie side by side; ``grouped`` does not."""

    def forward(self, x: Tensor, keys: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        def heads(count: int, width: int = WIDTH) -> Tensor:
            return x[..., : count * width].unflatten(-1, (count, width)).transpose(1, 2)

        def joined(y: Tensor) -> Tensor:
            return y.transpose(1, 2).flatten(2)

        q, few = heads(HEADS), heads(SHARED)
        pairs = keys[:, None, None] & keys[:, None, :, None]
        both = keys[:, None, None] & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return (
            joined(attend(q, q, q)),
            joined(attend(q, q, q, attn_mask=keys[:, None, None])),
            joined(attend(q, q, q, attn_mask=pairs, scale=0.7)),
            joined(attend(q, q, q, attn_mask=added)),
            joined(attend(q, q, q, attn_mask=added.clamp(min=LOWEST))),
            joined(attend(q, q, q, is_causal=True)),
            joined(attend(q, q, q, attn_mask=both)),
            attend(q.neg(), few.neg(), few, attn_mask=pairs, enable_gqa=True),
            joined(attend(q, q, heads(HEADS, 2 * WIDTH))),
        )


def given() -> dict[str, Tensor]:
    """The first row ends early, the second begins late, of the third nothing is seen."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    keys[0, 3:] = keys[1, :2] = keys[2] = False
    added = torch.zeros(ROWS, 1, TOKENS, TOKENS).masked_fill(~keys[:, None, None], -torch.inf)
    x = torch.randn(ROWS, TOKENS, 2 * HEADS * WIDTH, generator=rng)
    return {"x": x, "keys": keys, "added": added}


def traced(module: torch.nn.Module, named: dict[str, Tensor], **sizes: Any) -> View:
    return gw.trace(module, (), named, dynamic_shapes={n: sizes.get(n, {}) for n in named})


@pytest.fixture(scope="module")
def view() -> View:
    rows, tokens = Dim("rows"), Dim("tokens")
    both = {0: rows, 1: tokens}
    return traced(
        Attentions(), given(), x=both, keys=both, added={0: rows, 2: tokens, 3: tokens}
    )  # fmt: skip


def kinds(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_each_kind_is_one_node_that_computes_what_torch_does(view: View) -> None:
    """Of a row that sees nothing zeros, and the mean of all values where it is only made small."""
    model = lowered(view).model
    assert model.opset_imports[""] == 23 and model.ir_version >= 11
    assert kinds(model)["Attention"] == len(KINDS) and not kinds(model)["Softmax"]
    onnx.checker.check_model(onnx_ir.serde.serialize_model(model), full_check=True)
    inputs = given()
    results = run(model, inputs)
    expected = Attentions()(**inputs)
    assert not expected[3][2].any() and expected[4][2].any()
    for kind, got, want in zip(KINDS, results.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE, msg=kind)


def test_it_is_read_back(view: View) -> None:
    """With masks as they were: not as large as the logits, conditions where they were conditions,
    and no element of another size than the source's."""
    model = lowered(view).model
    read = OnnxView(model.clone())
    canonicalize(read)
    sites = [node for node in read.nodes() if read.op(node) == "sdpa"]
    masks = [read.type(m) if is_value(m := (*read.operands(n), None)[3]) else None for n in sites]
    one, square = "bool[rows, 1, 1, tokens]", "bool[rows, 1, tokens, tokens]"
    large = "f32[rows, 1, tokens, tokens]"
    expected = [None, one, square, large, large, None, square, square, None]
    assert [None if mask is None else str(mask) for mask in masks] == expected
    assert read.name(read.tensor(sites[3], 3)) == "added"
    assert [read.attrs(n)["causal"] for n in sites] == [kind == "causal" for kind in KINDS]
    assert [read.attrs(n)["gqa"] for n in sites] == [kind == "grouped" for kind in KINDS]
    assert kinds(lowered(read).model) == kinds(model)


class Capped(torch.nn.Module):
    """As Gemma 2 caps its logits, before a mask is added to them."""

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        logits = torch.tanh(q @ q.transpose(2, 3) * WIDTH**-0.5 / 0.5) * 0.5
        return (torch.softmax(logits + added, -1) @ q).transpose(1, 2).flatten(2)


def test_a_cap_is_the_nodes() -> None:
    named = {key: value[:2] for key, value in given().items() if key != "keys"}
    named["x"] = named["x"][..., : HEADS * WIDTH]
    view = traced(Capped(), named)
    canonicalize(view)
    model = lowered(view).model
    assert kinds(model)["Attention"] == 1 and not kinds(model)["Tanh"]
    (got,) = run(model, named).values()
    torch.testing.assert_close(got, Capped()(**named), rtol=TOLERANCE, atol=TOLERANCE)


class Seen(torch.nn.Module):
    """A text, and attention among the patches of pictures."""

    def forward(self, input_ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        q = pixels.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return input_ids + 1, attend(q, q, q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("count", [0, 2])
def test_pictures_may_be_none_beside_a_text(count: int) -> None:
    named = {
        "input_ids": torch.ones(2, TOKENS, dtype=torch.int64),
        "pixels": torch.randn(3, TOKENS, HEADS * WIDTH),
    }
    sizes: dict[str, Any] = {"input_ids": {0: Dim("rows")}, "pixels": {0: Dim("images")}}
    seen = traced(Seen(), named, **sizes)
    assert never_none(seen) == {"rows"}
    model = lowered(seen).model
    assert not kinds(model)["Attention"] and model.opset_imports[""] < 23
    named["pixels"] = named["pixels"][:count]
    (_, got), (_, want) = run(model, named).values(), Seen()(**named)
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


class Turned(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return attend(q.neg(), q.neg(), q).transpose(1, 2).flatten(2)


class Kept(torch.nn.Module):
    """Beside a cache, heads that share keys."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        q = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = (torch.cat((past, q[:, :SHARED]), 2) for past in (past_k, past_v))
        return attend(q, k, v, enable_gqa=True), k, v


class Alone(torch.nn.Module):
    """Queries of one row for all rows of keys, as a resampler has; broadcast by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.randn(1, 3, HEADS * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (each.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for each in (self.asked, x))
        return attend(q, k, k).transpose(1, 2).flatten(2)


X = torch.randn(2, TOKENS, HEADS * WIDTH)
PAST = torch.randn(2, SHARED, 3, WIDTH)


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (Turned(), {"x": X}, "heads are transposed around it, and none share keys"),
        (Turned(), {"x": X.half()}, "not float32"),
        (Kept(), {"x": X, "past_k": PAST, "past_v": PAST}, "beside a cache"),
    ],
)
def test_what_gains_nothing_keeps_its_products(
    module: torch.nn.Module, inputs: dict[str, Tensor], reason: str
) -> None:
    view = lowered(traced(module, inputs))
    assert not kinds(view.model)["Attention"]
    canonicalize(view)
    report = rewrite(view, [UseAttention(view)])
    assert reason in report.refusals[UseAttention.name].reason


def test_rows_that_are_broadcast_keep_their_products() -> None:
    """The node wants as many rows of queries as of keys."""
    module = Alone()
    model = lowered(traced(module, {"x": X}, x={0: Dim("rows")})).model
    assert not kinds(model)["Attention"]
    (got,) = run(model, {"x": X}).values()
    torch.testing.assert_close(got, module(X), rtol=TOLERANCE, atol=TOLERANCE)


def test_an_opset_is_raised_where_all_ops_mean_the_same() -> None:
    info = onnx.helper.make_tensor_value_info
    x, grid = (info(n, onnx.TensorProto.FLOAT, [1, 1, 2, 2]) for n in ("x", "grid"))
    node = onnx.helper.make_node("GridSample", ["x", "grid"], ["y"])
    result = info("y", onnx.TensorProto.FLOAT, [1, 1, 2, 2])
    graph = onnx.helper.make_graph([node], "g", [x, grid], [result])
    for opset, taken in ((17, False), (18, False), (20, True), (21, True)):
        ids = [onnx.helper.make_opsetid("", opset)]
        view = OnnxView(onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=ids)))
        assert takes_opset(view) == taken
