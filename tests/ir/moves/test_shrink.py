"""The move shrink: keeping all changes no bit, a choice equals the model on the chosen tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.view import Node, Value, View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.moves import shrink
from graphwright.ir.moves.shrink_dim import Positions
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import recognize

from ... import models as small_models

NAMES = ("llama", "qwen2", "gpt2", "bert")


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, dict[str, View]]]:
    by_name = {}
    for name in NAMES:
        small = getattr(small_models, name)(layers=2)
        by_name[name] = small, small_models.raised(small)
    return by_name


def positions_of_all(view: View, value: Value, place: Node | None = None) -> Value:
    """0, 1, 2 .. in each row: i64 ``[rows, tokens]``."""
    place = view.after(view.producer(value)) if place is None else place
    column = view.build("slice", [value, 0, 1], {"dim": 2}, before=place)
    flat = view.build("squeeze", [column], {"dims": (2,)}, before=place)
    ones = view.build("eq", [flat, flat], before=place)
    ones = view.build("cast", [ones], {"dtype": torch.int64}, before=place)
    counted = view.build("cumsum", [ones], {"dim": 1}, before=place)
    return view.build("sub", [counted, 1], before=place)


def some_positions(view: View, value: Value, chosen: list[int]) -> Value:
    """The same ``chosen`` in each row."""
    place = view.after(view.producer(value))
    every = positions_of_all(view, value, place)
    table = view.add_weight("chosen", MemoryWeight(torch.tensor([chosen])))
    row = view.build("slice", [every, 0, 1], {"dim": 1}, before=place)
    row = view.build("mul", [row, 0], before=place)
    return view.build("add", [row, table], before=place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("positions", ["kept", "renumbered"])
@pytest.mark.parametrize("block", [0, 1])
def test_keeping_all_changes_no_bit(
    models: Any, name: str, kind: str, positions: Positions, block: int
) -> None:
    small, views = models[name]
    before = sweep(views[kind], small.inputs)
    view = views[kind].copy()
    value = recognize(view).blocks[block].entry
    kept = positions_of_all(view, value)
    shrink(view, value, kept, positions=positions, rule="test")
    check_structure(view)
    after = sweep(view, small.inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_first_tokens_alone_are_a_shorter_prompt(models: Any, name: str, kind: str) -> None:
    """Causal models: with the first tokens kept, their outputs are as if there were no others."""
    small, views = models[name]
    for positions in ("kept", "renumbered"):
        view = views[kind].copy()
        value = recognize(view).blocks[1].entry
        kept = some_positions(view, value, [0, 1, 2])
        shrink(view, value, kept, positions=positions, rule="test")
        check_structure(view)
        for (output, whole), (again, part) in zip(
            sweep(views[kind], small.inputs).items(), sweep(view, small.inputs).items(), strict=True
        ):
            assert output == again
            torch.testing.assert_close(part, whole[:, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_renumbering_matters_where_tokens_leave_before_others(models: Any, kind: str) -> None:
    small, views = models["llama"]
    outputs = {}
    positions: Positions
    for positions in ("kept", "renumbered"):
        view = views[kind].copy()
        value = recognize(view).blocks[0].entry
        kept = some_positions(view, value, [0, 3, 4])
        shrink(view, value, kept, positions=positions, rule="test")
        (outputs[positions],) = sweep(view, small.inputs).values()
    shorter = {n: t[:, [0, 3, 4]] for n, t in small.inputs.items()}
    (expected,) = sweep(views[kind], shorter).values()
    torch.testing.assert_close(outputs["renumbered"], expected, rtol=1e-4, atol=1e-5)
    assert (outputs["kept"] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_types_say_the_new_length(models: Any, kind: str) -> None:
    _, views = models["llama"]
    view = views[kind].copy()
    value = recognize(view).blocks[1].entry
    kept = some_positions(view, value, [0, 2])
    new = shrink(view, value, kept, positions="kept", rule="test")
    assert str(view.type(new)) == "f32[batch, 2, 32]"
    (logits,) = view.outputs()
    assert str(view.type(logits)) == "f32[batch, 2, 97]"


def test_a_fixed_length_is_refused() -> None:
    small = small_models.llama(layers=2)
    rows = {0: small.dynamic_shapes["input_ids"][0]}
    shapes = dict.fromkeys(small.inputs, rows)
    view = trace(small.module, kwargs=small.inputs, dynamic_shapes=shapes)
    canonicalize(view)
    value = recognize(view).blocks[1].entry
    kept = positions_of_all(view, value)
    with pytest.raises(Refusal, match=r"is fixed .*trace the model with a dynamic sequence"):
        shrink(view, value, kept, positions="kept", rule="test")


def test_the_size_of_another_dimension_is_not_taken_again() -> None:
    """reshape(h, [2, -1, Shape(x)[2:]]): the width does not change with the tokens."""
    x = onnx_ir.Value(
        name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        shape=onnx_ir.Shape(["rows", "tokens", 8]),
    )  # fmt: skip
    graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="sized")
    view = OnnxView(onnx_ir.Model(graph, ir_version=10))
    hidden = view.emit("Relu", [x]).outputs[0]
    width = view.emit("Shape", [x], {"start": 2}).outputs[0]
    target = view.emit("Concat", [view.integers([2, -1]), width], {"axis": 0}).outputs[0]
    out = view.emit("Reshape", [hidden, target]).outputs[0]
    for value in (hidden, out):
        value.dtype, value.shape = x.dtype, x.shape
    graph.outputs.append(out)
    kept = some_positions(view, hidden, [1, 2])
    shrink(view, hidden, kept, positions="renumbered", rule="test")
    counts = Counter(view.native_op(node) for node in view.nodes())
    assert counts["Shape"] == 1
    assert counts["graphwright::token_select"] == 1
    rows = torch.arange(48.0).reshape(2, 3, 8)
    assert torch.equal(sweep(view, {"x": rows})[str(out.name)], rows[:, 1:])
