"""Graphs as text: what is printed parses to a graph that prints and computes the same."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import AbsentWeight, MemoryWeight
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.text.graph import diff_graphs, parse_graph, print_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from ... import models as small_models

KINDS = ("fx", "onnx")


def head(kind: str) -> str:
    return "fx graph\n" if kind == "fx" else 'onnx graph\nir_version 10\nopset "" 20\n'


@functools.cache
def exported(family: str, kind: str) -> tuple[View, dict[str, torch.Tensor]]:
    small = small_models.BUILDERS[family](1)
    if kind == "fx":
        return small_models.traced(small), small.inputs
    program = torch.export.export(
        small.module, (), small.inputs, dynamic_shapes=small.dynamic_shapes
    ).run_decompositions({})
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None
    return OnnxView(onnx_program.model), small.inputs


def weight_values(view: View) -> dict[str, Any]:
    nodes = list(view.nodes())
    values = {v for n in nodes for v in view.arguments(n)} | set(view.outputs())
    return {view.name(v): v for v in values if view.weight(v) is not None}


@pytest.mark.parametrize(("family", "kind"), [("bert", "onnx"), ("llama", "fx")])
def test_an_exported_transformer_comes_back_from_its_text(family: str, kind: str) -> None:
    view, inputs = exported(family, kind)
    text = print_graph(view)
    parsed = parse_graph(text)
    assert parsed.kind == kind
    assert print_graph(parsed) == text
    check_structure(parsed)
    assert parsed.input_names() == view.input_names()
    assert parsed.output_names() == view.output_names()
    weights = view.weights()
    for name, value in weight_values(parsed).items():
        if isinstance(parsed.weight(value), AbsentWeight):
            parsed.set_weight(value, weights[name])
    expected, actual = sweep(view, inputs), sweep(parsed, inputs)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_weight_is_absent_once_parsed(kind: str) -> None:
    text = head(kind) + (
        "input %x: f32[3, 5]\n"
        "weight @layer.0.w: f32[5, 5]\n"
        "weight @one: f32[1] = [0.1]\n"
        "%y: f32[3, 5] = matmul(%x, @layer.0.w)\n"
        "%z: f32[3, 5] = mul(%y, @one)\n"
        "output out = %z\n"
    )
    view = parse_graph(text)
    with pytest.raises(Missing, match=r"layer\.0\.w"):
        sweep(view, {"x": torch.ones(3, 5)})
    value = weight_values(view)["layer.0.w"]
    view.set_weight(value, MemoryWeight(torch.eye(5)))
    actual = sweep(view, {"x": torch.full((3, 5), 3.0)})["out"]
    assert torch.equal(actual, torch.full((3, 5), 3.0) * torch.tensor([0.1]))


FX = """fx graph
input %x: f32[batch, seq + 1, 6]
input %ids: i64[batch]
weight @table: f32[9, 6]
weight @half: f16[2, 2] = [0.5, -1.0, inf, 0.0999755859375]
weight @"a weight": bool[3] = [True, False, True]
%size: int(batch) = size(%x) {dim = 0}
%twice: int(batch*2) = _operator.mul(%size, 2)
%odd: f32[batch, Max(1, seq), 6] = aten.hardtanh.default(%x)
(%low: f32[batch, seq + 1, 2], _, %high: f32[batch, seq + 1, 1]) = split(%x) {sizes = (2, 3, 1), dim = 2}
(_, %where: i64[batch, seq + 1, 1]) = topk(%low) {k = 1, dim = 2}
(%m: f32[batch, 2], _) = aten.var_mean.correction(%low, [1]) {correction = 0.0, keepdim = False}
%wide: f32[batch, seq + 1, 2] = aten.to.device(%low, device("cpu"), f32) {memory_format = torch("torch.contiguous_format")}
%half_2: f16[2, 2] = mul(@half, 2.0)
%picked: bool[3] = logical_not(@"a weight")
%rows: f32[batch, 6] = embedding(@table, %ids)
%more: f32[batch, 1, 6] = aten.index.Tensor(%odd, [None, %ids])
%n: f32[batch, seq + 1, 6] = layer_norm(%x) {eps = 1e-12}
%full: f32[batch, 6] = aten.full_like.default(%rows, -inf) {pin_memory = False}
output logits = %m
output "odd name" = %full
output again = %m
"""  # noqa: E501

ONNX = """onnx graph
ir_version 10
opset "" 20
opset "com.microsoft" 1
input %x: f32[batch, 3, ?]
weight @k: i64[1] = [2]
weight @w: bf16[17]
%/model/Relu:0: f32[batch, 3, ?] = relu(%x)
%shape: i64[3] = ai.onnx::Shape(%x)
%"with space": f32[batch, 3, ?] = reshape(%/model/Relu:0, %shape)
%low: f32[] = amax(%x) {dims = ()}
%clip: f32[batch, 3, ?] = ai.onnx::Clip(%x, None, %low)
%gelu: ?[*] = com.microsoft::FastGelu(%clip) {note = "a \\"quoted\\" word", scales = [1.0, inf]}
(%a: f32[batch, 1, ?], _) = ai.onnx::Split(%gelu) {axis = 1, num_outputs = 2}
%cast: bf16[17] = identity(@w)
%silu: f32[batch, 1, ?] = silu(%a)
output cast = %cast
output silu = %silu
"""


@pytest.mark.parametrize("text", [FX, ONNX], ids=KINDS)
def test_a_graph_written_by_hand_prints_as_it_was_written(text: str) -> None:
    used = [line for line in text.splitlines() if not line.startswith("weight @k")]
    assert print_graph(parse_graph(text)).splitlines() == used


def test_dimensions_of_a_parsed_graph_keep_their_arithmetic() -> None:
    view = parse_graph(FX)
    node = next(n for n in view.nodes() if view.op(n) == "layer_norm")
    value = view.build("reshape", (view.result(node), -1), before=view.after(node))
    (dim,) = view.type(value).shape or ()
    assert dim in ("6*batch*(seq + 1)", "6*batch*seq + 6*batch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y: f32[3] = adds(%x, 1.0)", "line {n}: unknown op 'adds'; did you mean add"),
        ("%y: f32[3] = add(%z, 1.0)", "line {n}: %z is used before it is defined"),
        ("%x: f32[3] = add(%x, 1.0)", "line {n}: %x is defined twice"),
        ("%y: f33[3] = add(%x, 1.0)", "line {n}: unknown dtype 'f33'"),
        ("%y: f32[3 = add(%x, 1.0)", "line {n}: expected a type"),
        ("%y: f32[3] = add(%x, 1.0", "line {n}: expected ',' before the end of the line"),
        ("%y: f32[3] = add(%x, 1.0) trailing", "line {n}: nothing is expected after"),
        ("%y: f32[3] = add(%x)", "line {n}: add takes 2 to 2 operands, not 1"),
        ("%y: f32[3] = softmax(%x)", "line {n}: softmax needs the attribute dim"),
        ("%y: f32[3] = softmax(%x) {axis = 0}", "line {n}: softmax has no attribute axis"),
        ("%y: f32[3] = softmax(%x) {dim = 0, dim = 0}", "the attribute dim is given twice"),
        ("%y: f32[3] = softmax(%x) {dim = zero}", "line {n}: 'zero' is not a constant"),
        ("(%y: f32[3], _) = split(%x) {sizes = (1, 1, 1), dim = 0}", "has 3 results, not 2"),
        ("weight @w: f32[3]\n%y: f32[3] = relu(%x)\nweight @v: f32[3]", "before the first op"),
        ("weight @w: f32[seq]", "line {n}: the weight @w needs a dtype and a shape of numbers"),
        ("weight @w: f32[3] = [1.0]", "line {n}: @w: 3 numbers are needed"),
        ("weight %w: f32[3]", "an input is written %name and a weight @name"),
        ("wieght @w: f32[3]", "line {n}: 'wieght' begins no line"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(kind: str, line: str, reason: str) -> None:
    start = head(kind) + "# a comment\n\ninput %x: f32[3]\n"
    number = start.count("\n") + 1
    with pytest.raises(BadInput) as caught:
        parse_graph(f"{start}{line}\noutput out = %x\n")
    assert reason.format(n=number) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y: f32[3] = aten.nothing.default(%x)", "torch has no op aten.nothing.default"),
        ("%y: f32[3] = aten.relu_.default(%x)", "works in place"),
        ("%y: f32[3] = torch.load(%x)", "'torch.load' is not an op"),
        ("%y: f32[3] = posix.system.call(%x)", "torch has no op posix.system.call"),
        ("%y: ?[3] = relu(%x)", "has a dtype and a shape"),
        ('%y: f32[3] = aten.to.device(%x, device("gpu"), f32)', "'gpu' is not a device"),
    ],
)
def test_what_an_fx_graph_may_not_hold(line: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        parse_graph(f"{head('fx')}input %x: f32[3]\n{line}\noutput out = %y\n")
    assert str(caught.value).startswith("line 3: ")


@pytest.mark.parametrize("text", ["", "graph\n", "torch graph\n"])
def test_a_text_that_is_no_graph(text: str) -> None:
    with pytest.raises(BadInput, match="line 1: a graph begins with the line 'fx graph'"):
        parse_graph(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_needs_an_output(kind: str) -> None:
    with pytest.raises(BadInput, match="ends without an output"):
        parse_graph(head(kind) + "input %x: f32[3]\n%y: f32[3] = relu(%x)\n")


@pytest.mark.parametrize("kind", KINDS)
def test_the_diff_shows_what_changed_and_nothing_else(kind: str) -> None:
    text = head(kind) + (
        "input %x: f32[1, 5]\n%a: f32[1, 5] = exp(%x)\n%b: f32[1, 5] = neg(%a)\noutput y = %b\n"
    )
    before, after = parse_graph(text), parse_graph(text.replace("exp(%x)", "tanh(%x)"))
    assert diff_graphs(before, before) == ""
    changed = [line for line in diff_graphs(before, after).splitlines() if line[0] in "+-"]
    assert changed[2:] == ["-%a: f32[1, 5] = exp(%x)", "+%a: f32[1, 5] = tanh(%x)"]


def test_a_python_function_has_no_text_form() -> None:
    view = parse_graph(f"{head('fx')}input %x: f32[3]\n%y: f32[3] = relu(%x)\noutput out = %y\n")
    assert isinstance(view, FxView)
    next(iter(view.nodes())).target = sweep
    with pytest.raises(
        BadInput, match=r"y: the function graphwright\.ir\.run\.sweep\.sweep has no text"
    ):
        print_graph(view)


def test_a_constant_of_strings_has_no_text_form() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[3] x) => (string[1] y)'
        '{ s = Constant <value = string[1] {"a"}> () y = Identity(s) }'
    )
    view = OnnxView(onnx_ir.from_proto(model))
    with pytest.raises(BadInput, match="a constant of dtype STRING has no text form"):
        print_graph(view)


BRANCHES = """
<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
g (float[3] x, bool flag) => (float[3] y, float[3] z)
<float[3] w = {1.0, -2.0, 3.0}>
{
  t = Exp (x)
  y = If (flag) <
    then_branch = then () => (float[3] a) { a = Add (t, w) },
    else_branch = other () => (float[3] b) { b = Neg (t) }
  >
  z = own.Twice (t)
}
<domain: "own", opset_import: ["" : 20]>
Twice (p) => (q) { q = Add (p, p) }
"""


def test_branches_and_functions_come_back_and_run() -> None:
    view = OnnxView(onnx_ir.from_proto(onnx.parser.parse_model(BRANCHES)))
    text = print_graph(view)
    parsed = parse_graph(text)
    assert print_graph(parsed) == text
    x = torch.tensor([0.5, -1.0, 2.0])
    branches = {True: x.exp() + torch.tensor([1.0, -2.0, 3.0]), False: -x.exp()}
    for flag, expected in branches.items():
        for graph in (view, parsed):
            outputs = sweep(graph, {"x": x, "flag": torch.tensor(flag)})
            torch.testing.assert_close(outputs["y"], expected)
            torch.testing.assert_close(outputs["z"], 2 * x.exp())


OPS = ("add", "mul", "sub", "maximum")
UNARY = ("neg", "tanh", "relu", "sigmoid", "silu")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, tuple[int, int]]:
    """The text of a random graph on [rows, width] values, its kind among the things drawn."""
    rows, width = draw(st.sampled_from([1, 5, 123])), draw(st.sampled_from([1, 3, 8]))
    shape = f"f32[{rows}, {width}]"
    lines = [head(draw(st.sampled_from(KINDS))) + f"input %x: {shape}"]
    lines.append(f"weight @w: f32[{width}, {width}]" + _numbers(width * width))
    names = ["%x"]
    for index in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["binary", "unary", "scalar", "matmul", "reshape"]))
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        name = f"%v{index}"
        if kind == "binary":
            lines.append(f"{name}: {shape} = {draw(st.sampled_from(OPS))}({a}, {b})")
        elif kind == "unary":
            lines.append(f"{name}: {shape} = {draw(st.sampled_from(UNARY))}({a})")
        elif kind == "scalar":
            lines.append(f"{name}: {shape} = add({a}, {b})")
        elif kind == "matmul":
            lines.append(f"{name}: {shape} = matmul({a}, @w)")
        else:
            lines.append(f"{name}_flat: f32[{rows * width}] = reshape({a}, {rows * width})")
            lines.append(f"{name}: {shape} = reshape({name}_flat, {rows}, -1)")
        names.append(name)
    lines.append(f"output y = {names[-1]}")
    return "\n".join(lines) + "\n", (rows, width)


def _numbers(count: int) -> str:
    return f" = {[i / 8 - 0.25 for i in range(count)]}" if count <= 16 else ""


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_random_graphs_keep_their_text_and_their_meaning(drawn: tuple[str, Any]) -> None:
    text, shape = drawn
    view = parse_graph(text)
    check_structure(view)
    printed = print_graph(view)
    again = parse_graph(printed)
    assert print_graph(again) == printed
    assert print_graph(view.copy()) == printed
    large = MemoryWeight(torch.linspace(-1, 1, shape[1] ** 2).reshape(shape[1], shape[1]))
    for graph in (view, again):
        for value in weight_values(graph).values():
            if isinstance(graph.weight(value), AbsentWeight):
                graph.set_weight(value, large)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sweep(view, {"x": x})["y"], sweep(again, {"x": x})["y"])
