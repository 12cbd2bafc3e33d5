"""What both views promise: reading, editing, types that follow, nodes that stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from graphwright.ir.core.errors import BadInput, InvalidGraph, Refusal
from graphwright.ir.core.types import Type
from graphwright.ir.core.view import NATIVE, NO_SCOPE, Origin, Source, Value, View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.parts import innermost_scope
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.rewrite.driver import rewrite
from graphwright.ir.rewrite.rule import Build, Rule
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from onnx import TensorProto, helper

aten = torch.ops.aten
F32 = torch.float32
Drafts = Callable[..., Any]


def ops(view: View) -> list[str]:
    return [view.op(node) for node in view.nodes()]


def run(view: View, **inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(sweep(view, inputs).values())


class FuseSilu(Rule):
    """mul(x, sigmoid(x)) => silu(x)"""

    name = "fuse-silu"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def replace(self, build: Build, x: Any) -> Value:
        return build.silu(x)


# --- reading ----------------------------------------------------------------------------------


def test_nodes_values_users_and_types(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(5, 7))
    w = d.weight("w", torch.ones(7))
    product = d.op("matmul", d.x, d.y)
    total = d.op("add", product, w)
    view = d.finish(total)
    first, last = view.nodes()
    assert (view.op(first), view.op(last)) == ("matmul", "add")
    assert view.operands(last) == (product, w)
    assert view.results(first) == (product,)
    assert view.producer(product) is first and view.producer(d.x) is None
    assert view.users(product) == (last,) and view.users(total) == ()
    assert view.is_output(total) and not view.is_output(product)
    assert view.inputs() == (d.x, d.y) and view.outputs() == (total,)
    assert view.type(total) == Type(F32, (3, 7))
    assert view.weight(w) is not None and view.weight(product) is None
    assert view.arguments(last) == (product, w)
    assert list(view.weights()) == ["w"] and view.name(w) == "w"


def test_numbers_are_read_as_numbers_on_both_graphs(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("mul", d.x, 0.5))
    (node,) = view.nodes()
    assert view.number(view.operands(node)[1]) == 0.5
    assert view.number(view.operands(node)[0]) is None
    assert view.number(None) is None


def test_a_node_of_several_results(draft: Drafts) -> None:
    d = draft(outputs=2, x=(3, 7))
    first = d.op("split", d.x, sizes=(2, 5), dim=1)
    node = d.view.producer(first)
    second = d.view.results(node)[1]
    view = d.finish(d.op("neg", second), first)
    assert [view.type(v).shape for v in view.results(node)] == [(3, 2), (3, 5)]
    assert view.producer(second) is node
    with pytest.raises(Refusal, match="has 2 results, one is needed"):
        view.result(node)
    x = torch.randn(3, 7)
    negated, kept = run(view, x=x)
    assert torch.equal(negated, -x[:, 2:]) and torch.equal(kept, x[:, :2])


def test_a_node_outside_the_vocabulary_is_opaque_and_runs(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    native = d.native(aten.sign.default, "Sign", d.op("neg", d.x))
    view = d.finish(d.op("abs", native))
    node = view.producer(native)
    assert view.op(node) == NATIVE and view.read(node) is None
    assert view.native_op(node) in ("aten.sign.default", "Sign")
    assert view.operands(node) == (view.outputs() and view.arguments(node)[0],)
    assert rewrite(view, [FuseSilu()]).total == 0
    x = torch.tensor([[0.5, -0.0, 0.0, -2.0, 3.0]] * 3)
    assert torch.equal(run(view, x=x)[0], (-x).sign().abs())


# --- editing ----------------------------------------------------------------------------------


def test_replace_moves_every_use_and_keeps_the_names_of_outputs(draft: Drafts) -> None:
    d = draft(outputs=2, x=(3, 5))
    old = d.op("exp", d.x)
    view = d.finish(d.op("add", old, old), old)
    names = view.output_names()
    new = view.build("tanh", [d.x], before=view.producer(old))
    view.replace(old, new)
    view.erase(view.producer(old))
    check_structure(view)
    assert view.output_names() == names
    x = torch.randn(3, 5)
    doubled, single = run(view, x=x)
    torch.testing.assert_close(doubled, 2 * x.tanh())
    torch.testing.assert_close(single, x.tanh())


def test_an_output_replaced_by_an_input_keeps_its_name(draft: Drafts) -> None:
    d = draft(x=(5,))
    view = d.finish(d.op("neg", d.op("neg", d.x)))
    names = view.output_names(), view.input_names()
    node = view.producer(view.outputs()[0])
    view.replace(view.outputs()[0], d.x)
    view.erase_dead(node)
    check_structure(view)
    assert (view.output_names(), view.input_names()) == names
    x = torch.randn(5)
    assert torch.equal(run(view, x=x)[0], x)


def test_two_outputs_may_become_one_value(draft: Drafts) -> None:
    d = draft(outputs=2, x=(3, 5))
    a, b = d.op("exp", d.x), d.op("tanh", d.x)
    view = d.finish(a, b)
    names = view.output_names()
    node = view.producer(b)
    view.replace(b, a)
    view.erase_dead(node)
    check_structure(view)
    assert view.output_names() == names
    x = torch.randn(3, 5)
    assert all(torch.equal(result, x.exp()) for result in run(view, x=x))


def test_replace_does_not_feed_a_value_to_its_own_maker(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    old = d.op("exp", d.x)
    view = d.finish(d.op("neg", old))
    wrapped = view.build("tanh", [old], before=view.after(view.producer(old)))
    view.replace(old, wrapped)
    check_structure(view)
    x = torch.randn(3, 5)
    torch.testing.assert_close(run(view, x=x)[0], -x.exp().tanh())


def test_erase_refuses_what_is_used(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    inner = d.op("exp", d.x)
    view = d.finish(d.op("neg", inner))
    user = view.producer(view.outputs()[0])
    with pytest.raises(InvalidGraph, match=f"is still used by {view.name(user)}"):
        view.erase(view.producer(inner))
    with pytest.raises(InvalidGraph, match="is still used by"):
        view.erase(user)
    assert ops(view) == ["exp", "neg"]


def test_erase_dead_stops_at_what_is_used(draft: Drafts) -> None:
    d = draft(x=(3, 7))
    kept = d.op("exp", d.x)
    halves = d.op("split", kept, sizes=(3, 4), dim=1)
    dead = d.op("add", d.op("neg", halves), 1.0)
    view = d.finish(d.op("tanh", kept))
    gone = view.erase_dead(view.producer(dead))
    assert len(gone) == 3 and ops(view) == ["exp", "tanh"]
    assert view.erase_dead(view.producer(view.outputs()[0])) == []


def test_set_operand_changes_one_place(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 5))
    view = d.finish(d.op("sub", d.x, d.x))
    (node,) = view.nodes()
    view.set_operand(node, 1, d.y)
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(run(view, x=x, y=y)[0], x - y)
    view.set_operand(node, 0, 2.0)
    assert torch.equal(run(view, x=x, y=y)[0], 2.0 - y)


def test_set_operand_knows_where_the_native_form_keeps_it(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 4), z=(3, 2))
    view = d.finish(d.op("concat", d.x, d.y, dim=1))
    (node,) = view.nodes()
    view.set_operand(node, 1, d.z)
    assert view.operands(node) == (d.x, d.z)
    assert view.type(view.outputs()[0]).shape == (3, 7)


def test_a_native_node_takes_no_number_by_set_operand(draft_of: Any) -> None:
    d = draft_of("fx", {"x": (3, 5)})
    view = d.finish(d.native(aten.sign.default, "Sign", d.x))
    (node,) = view.nodes()
    with pytest.raises(Refusal, match="the inputs of a native node are tensors"):
        view.set_operand(node, 0, 2.0)
    assert view.operands(node) == (d.x,)


def test_types_follow_a_replacement_of_another_shape(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 2))
    exp = d.op("exp", d.x)
    both = d.op("concat", exp, d.op("neg", exp), dim=1)
    view = d.finish(d.op("mean", both, dims=(0,)))
    new = view.build("tanh", [d.y], before=view.producer(exp))
    view.replace(exp, new)
    assert view.type(both).shape == (3, 4)
    assert view.type(view.outputs()[0]).shape == (4,)
    view.erase_dead(view.producer(exp))
    check_structure(view)
    assert run(view, x=torch.randn(3, 5), y=torch.randn(3, 2))[0].shape == (4,)


def test_a_replacement_that_a_user_cannot_take_is_an_error(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 2), w=(7, 5))
    exp = d.op("exp", d.x)
    view = d.finish(d.op("linear", exp, d.w))
    new = view.build("tanh", [d.y], before=view.producer(exp))
    with pytest.raises(InvalidGraph, match="does not fit its operands"):
        view.replace(exp, new)


def test_a_refused_build_leaves_no_nodes(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.x))
    (node,) = view.nodes()
    with pytest.raises(Refusal, match="split"):
        view.build("split", [d.x], {"sizes": (2, 2), "dim": 1}, before=node)
    assert ops(view) == ["exp"]


def test_parts_of_a_form_are_typed(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("unsqueeze", d.x, dims=(0, 2)))
    for node in view.nodes():
        assert view.op(node) == "unsqueeze"
        assert None not in (view.type(view.result(node)).shape, view.type(view.result(node)).dtype)
    check_structure(view)


def test_origin_and_name_of_a_built_node(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.x))
    (node,) = view.nodes()
    view.origin = Origin("some-rule", 3)
    neg = view.producer(view.build("neg", [d.x], before=node, name="chosen"))
    assert view.name(neg) == "chosen"
    if isinstance(view, FxView):
        assert neg.meta["graphwright"] == Origin("some-rule", 3)
    else:
        assert neg.metadata_props["graphwright.rule"] == "some-rule"
        assert neg.metadata_props["graphwright.pass"] == "3"
    again = view.build("neg", [d.x], before=node, name="chosen")
    assert view.name(view.producer(again)) != "chosen"


# --- weights ----------------------------------------------------------------------------------


def test_weights_are_shared_by_key_and_named_apart(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    tensor = torch.randn(5)
    first = d.view.add_weight("w", MemoryWeight(tensor))
    assert d.view.add_weight("other", MemoryWeight(tensor)) is first
    second = d.view.add_weight("w", MemoryWeight(torch.randn(5)))
    assert second is not first and d.view.name(second) == "w_1"


def test_a_node_that_no_module_made_has_no_scope() -> None:
    assert innermost_scope(f"['', 'layers', 'layers.0', '{NO_SCOPE}', 'sym_size']") == ""
    assert innermost_scope("['', 'layers', 'layers.0', 'add']") == "layers.0"


def test_a_replaced_weight_is_shared_no_more(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    old, new = torch.zeros(5), torch.ones(5)
    first = d.view.add_weight("w", MemoryWeight(old))
    d.view.set_weight(first, MemoryWeight(new))
    second = d.view.add_weight("v", MemoryWeight(old))
    view = d.finish(d.op("add", d.op("mul", d.x, first), second))
    x = torch.randn(3, 5)
    assert torch.equal(run(view, x=x)[0], x)


def test_set_weight_keeps_shape_and_dtype(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    w = d.weight("w", torch.zeros(5))
    view = d.finish(d.op("add", d.x, w))
    for wrong in (torch.zeros(1), torch.zeros(5, dtype=torch.float64)):
        with pytest.raises(InvalidGraph, match=r"w: .* cannot stand for"):
            view.set_weight(w, MemoryWeight(wrong))
    view.set_weight(w, MemoryWeight(torch.full((5,), 2.0)))
    assert torch.equal(run(view, x=torch.zeros(3, 5))[0], torch.full((3, 5), 2.0))


def test_unused_weights_are_dropped(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    used = d.weight("used", torch.ones(5))
    d.weight("unused", torch.zeros(123))
    view = d.finish(d.op("add", d.x, used))
    assert view.drop_unused_weights() == 1
    assert list(view.weights()) == ["used"] and view.drop_unused_weights() == 0


@pytest.mark.parametrize("kept", [2.0, torch.full((5,), 2.0)])
def test_what_was_dropped_is_added_again_where_another_has_its_name(
    draft: Drafts, kept: Any
) -> None:
    d = draft(x=(3, 5))

    def times(factor: Any) -> Any:
        weight = MemoryWeight(factor) if isinstance(factor, torch.Tensor) else None
        return d.op("mul", d.x, factor if weight is None else d.view.add_weight("w", weight))

    d.view.erase(d.view.maker(times(kept)))
    d.view.drop_unused_weights()
    other = times(kept + 1)
    view = d.finish(d.op("sub", other, times(kept)))
    check_structure(view)
    factors = [view.operands(n)[1] for n in view.nodes() if view.op(n) == "mul"]
    names = {view.name(f) for f in factors if not isinstance(f, float)}
    assert names == set(view.weights()) and len(names) in (0, 2)


def test_a_graph_without_inputs_takes_weights() -> None:
    graph = torch.fx.Graph()
    graph.output(())
    view = FxView(graph, None, {}, ((), ()), Source(), {})
    with pytest.raises(InvalidGraph, match="no typed input"):
        view.add_weight("w", MemoryWeight(torch.ones(1)))


# --- copies -----------------------------------------------------------------------------------


def test_a_copy_is_independent(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    w = d.weight("w", torch.full((5,), 3.0))
    view = d.finish(d.op("mul", d.op("add", d.x, w), d.op("sigmoid", d.op("add", d.x, w))))
    view.metadata()["note"] = "first"
    twin = view.copy()
    twin.metadata()["note"] = "second"
    (output,) = twin.outputs()
    new = twin.build("exp", [twin.inputs()[0]], before=twin.producer(output))
    twin.replace(output, new)
    twin.erase_dead(twin.producer(output))
    twin.drop_unused_weights()
    assert ops(twin) == ["exp"] and len(ops(view)) == 4
    assert view.metadata() == {"note": "first"} and list(view.weights()) == ["w"]
    check_structure(view)
    check_structure(twin)
    x = torch.randn(3, 5)
    torch.testing.assert_close(run(view, x=x)[0], torch.nn.functional.silu(x + 3) + 0)
    assert torch.equal(run(twin, x=x)[0], x.exp())
    assert (twin.input_names(), twin.output_names()) == (view.input_names(), view.output_names())


def test_a_copy_has_types_of_its_own(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("neg", d.op("exp", d.x)))
    twin = view.copy()
    exp, _ = twin.nodes()
    half = twin.build("cast", [twin.inputs()[0]], {"dtype": torch.float16}, before=exp)
    twin.replace(twin.result(exp), half)
    assert twin.type(twin.outputs()[0]) == Type(torch.float16, (3, 5))
    assert view.type(view.outputs()[0]) == Type(F32, (3, 5))


def test_a_copy_shares_the_weights_themselves(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    w = d.weight("w", torch.ones(5))
    view = d.finish(d.op("add", d.x, w))
    twin = view.copy()
    assert twin.weights()["w"].key == view.weights()["w"].key
    (copied,) = (v for v in twin.arguments(next(iter(twin.nodes()))) if twin.weight(v))
    twin.set_weight(copied, MemoryWeight(torch.zeros(5)))
    assert torch.equal(view.weights()["w"].read(), torch.ones(5))


# --- what FX must refuse ----------------------------------------------------------------------


class _InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.mul_(2)
        return y


class _Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


def test_in_place_ops_are_refused() -> None:
    program = torch.export.export(_InPlace(), (torch.ones(3),))
    with pytest.raises(BadInput, match=r"aten\.mul_\.Tensor works in place"):
        FxView.from_program(program)
    view = FxView.from_program(program.run_decompositions({}))
    assert ops(view) == ["add", "mul"]


def test_a_model_that_writes_to_its_buffers_is_refused() -> None:
    program = torch.export.export(_Counter(), (torch.ones(3),)).run_decompositions({})
    with pytest.raises(BadInput, match="the model writes to 'count' while it runs"):
        FxView.from_program(program)


def test_symbolic_dimensions_are_named() -> None:
    program = torch.export.export(
        torch.nn.Linear(5, 7),
        (torch.ones(3, 2, 5),),
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")},),
    ).run_decompositions({})
    symbols = {
        str(node.meta["val"].shape[i].node.expr): name
        for node in program.graph.nodes
        if node.name == "input"
        for i, name in enumerate(("batch", "seq"))
    }
    view = FxView.from_program(program, dim_names=symbols)
    assert str(view.type(view.outputs()[0])) == "f32[batch, seq, 7]"
    x = torch.randn(1, 123, 5)
    assert run(view, input=x)[0].shape == (1, 123, 7)


# --- ONNX functions and subgraphs -------------------------------------------------------------


def _info(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _onnx_view(nodes: list[Any], inputs: list[Any], outputs: list[Any], **more: Any) -> OnnxView:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)
    onnx.checker.check_model(model)
    return OnnxView(onnx_ir.from_proto(model))


def _branches() -> OnnxView:
    """y = silu(x) if c else 2 silu(x), silu written out before the If."""
    then = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"])], "then", [], [_info("t", 3)]
    )
    two = helper.make_node("Constant", [], ["two"], value_float=2.0)
    double = helper.make_graph(
        [two, helper.make_node("Mul", ["s", "two"], ["e"])], "else", [], [_info("e", 3)]
    )
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["g"]),
        helper.make_node("Mul", ["x", "g"], ["s"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=double),
    ]
    return _onnx_view(nodes, [_info("x", 3), _info("c", kind=TensorProto.BOOL)], [_info("y", 3)])


def test_values_captured_by_a_subgraph_follow_a_rewrite() -> None:
    view = _branches()
    *_, branch = view.nodes()
    captured = view.operands(branch)
    assert view.op(branch) == NATIVE and view.native_op(branch) == "If"
    outer = view.arguments(branch)
    assert [v.name for v in outer] == ["c", "s"] and [v.name for v in captured] == ["c"]
    assert view.users(outer[1]) == (branch,)
    assert rewrite(view, [FuseSilu()]).total == 1
    check_structure(view)
    assert ops(view) == ["silu", NATIVE]
    x = torch.randn(3)
    silu = torch.nn.functional.silu(x)
    for flag, factor in ((True, 1.0), (False, 2.0)):
        torch.testing.assert_close(run(view, x=x, c=torch.tensor(flag))[0], factor * silu)


def test_an_intermediate_captured_by_a_subgraph_leaks() -> None:
    """The sigmoid is read inside the branch: it cannot go."""
    inner = [helper.make_node("Neg", ["g"], ["t"])]
    then = helper.make_graph(inner, "then", [], [_info("t", 3)])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [_info("e", 3)]
    )
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["g"]),
        helper.make_node("Mul", ["x", "g"], ["s"]),
        helper.make_node("If", ["c"], ["b"], "branch", then_branch=then, else_branch=other),
        helper.make_node("Add", ["s", "b"], ["y"]),
    ]
    inputs = [_info("x", 3), _info("c", kind=TensorProto.BOOL)]
    view = _onnx_view(nodes, inputs, [_info("y", 3)])
    report = rewrite(view, [FuseSilu()])
    assert report.total == 0
    assert report.refusals["fuse-silu"].reason == "the intermediate g is also used by branch"


def test_what_matches_inside_a_subgraph_stays() -> None:
    body = [
        helper.make_node("Sigmoid", ["x"], ["g"]),
        helper.make_node("Mul", ["x", "g"], ["t"]),
    ]
    then = helper.make_graph(body, "then", [], [_info("t", 3)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [_info("e", 3)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    inputs = [_info("x", 3), _info("c", kind=TensorProto.BOOL)]
    view = _onnx_view([node], inputs, [_info("y", 3)])
    assert rewrite(view, [FuseSilu()]).total == 0
    twin = view.copy()
    x = torch.randn(3)
    for graph in (view, twin):
        actual = run(graph, x=x, c=torch.tensor(True))[0]
        torch.testing.assert_close(actual, torch.nn.functional.silu(x))


def test_a_loop_is_kept_and_runs() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["a", "x"], ["b"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [_info("i", kind=TensorProto.INT64), _info("go", kind=TensorProto.BOOL), _info("a", 3)],
        [_info("on", kind=TensorProto.BOOL), _info("b", 3)],
    )
    nodes = [
        helper.make_node("Neg", ["x"], ["start"]),
        helper.make_node("Loop", ["n", "", "start"], ["y"], body=body),
    ]
    inputs = [_info("x", 3), _info("n", kind=TensorProto.INT64)]
    view = _onnx_view(nodes, inputs, [_info("y", 3)])
    x = torch.randn(3)
    for graph in (view, view.copy()):
        torch.testing.assert_close(run(graph, x=x, n=torch.tensor(5))[0], 4 * x)


def test_a_local_function_is_kept_and_runs() -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["g"]),
        helper.make_node("Mul", ["g", "x"], ["s"]),
        helper.make_node("Twice", ["s"], ["y"], domain="local"),
    ]
    view = _onnx_view(nodes, [_info("x", 3)], [_info("y", 3)], functions=[function])
    assert rewrite(view, [FuseSilu()]).total == 1
    assert ops(view) == ["silu", NATIVE] and len(view.model.functions) == 1
    assert view.native_op(list(view.nodes())[1]) == "local::Twice"
    x = torch.randn(3)
    for graph in (view, view.copy()):
        torch.testing.assert_close(run(graph, x=x)[0], 2 * torch.nn.functional.silu(x))


def test_values_with_operators_are_taken_over_as_plain_ones() -> None:
    class Overloaded(onnx_ir.Value):
        def __ne__(self, other: object) -> bool:
            raise AssertionError("a comparison inserted a node")

    x = Overloaded(
        name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape([3])
    )
    node = onnx_ir.Node("", "Neg", [x], name="neg")
    node.outputs[0].name = "y"
    graph = onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    view = OnnxView(onnx_ir.Model(graph, ir_version=10))
    assert type(view.inputs()[0]) is onnx_ir.Value
    assert torch.equal(run(view, x=torch.ones(3))[0], -torch.ones(3))


def test_constant_nodes_become_weights() -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value_floats=[1.0, 2.0, 4.0]),
        helper.make_node("Mul", ["x", "k"], ["y"]),
    ]
    view = _onnx_view(nodes, [_info("x", 3)], [_info("y", 3)])
    assert ops(view) == ["mul"] and list(view.weights()) == ["k"]
    assert torch.equal(run(view, x=torch.ones(3))[0], torch.tensor([1.0, 2.0, 4.0]))


# --- running ----------------------------------------------------------------------------------


def test_sweep_refuses_inputs_that_do_not_fit(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 5))
    view = d.finish(d.op("add", d.x, d.y))
    x = torch.randn(3, 5)
    with pytest.raises(BadInput, match=r"missing y; unknown z \(the graph takes x, y\)"):
        sweep(view, {"x": x, "z": x})
    with pytest.raises(BadInput, match=r"input y: expected f32\[3, 5\], got torch.float64"):
        sweep(view, {"x": x, "y": x.double()})
    with pytest.raises(BadInput, match=r"input x: expected f32\[3, 5\], got shape \[5\]"):
        sweep(view, {"x": x[0], "y": x})


def test_the_observer_sees_every_node_once_and_in_order(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("neg", d.op("exp", d.x)))
    runs: list[tuple[str, torch.Tensor]] = []
    x = torch.randn(3, 5)
    sweep(view, {"x": x}, observe=lambda node, _, results: runs.append((view.op(node), results[0])))
    assert [op for op, _ in runs] == ["exp", "neg"]
    assert torch.equal(runs[0][1], x.exp())


def test_every_edit_is_counted_and_nothing_else(draft: Drafts) -> None:
    d = draft(x=(3, 5), y=(3, 5))
    weight = d.weight("w", torch.ones(5))
    total = d.op("add", d.op("relu", d.x), weight)
    view = d.finish(total)
    assert view.copy().edits == view.edits
    first, last = view.nodes()
    counts = [view.edits]

    def counted() -> bool:
        counts.append(view.edits)
        return counts[-1] > counts[-2]

    check_structure(view)
    sweep(view, sample_inputs(view))
    assert not counted()
    built = view.build("neg", (d.y,), before=last)
    assert counted(), "build"
    (copied,) = view.clone(first, {}, before=last)
    assert counted(), "clone"
    view.rewire(last, view.result(first), built)
    assert counted(), "rewire"
    view.set_operand(last, 0, d.y)
    assert counted(), "set_operand"
    view.set_weight(weight, MemoryWeight(torch.zeros(5)))
    assert counted(), "set_weight"
    spare = view.add_weight("spare", MemoryWeight(torch.zeros(2)))
    assert counted(), "add_weight"
    assert view.add_weight("spare", view.weight(spare)) is spare and not counted()
    view.drop_unused_weights()
    assert counted(), "drop_unused_weights"
    view.replace(total, built)
    assert counted(), "replace"
    view.erase(last)
    assert counted(), "erase"
    view.erase_dead(first)
    assert counted(), "erase_dead"
    view.erase_dead(view.producer(copied))
    assert counted()
    added = view.add_input("z", d.x)
    assert counted(), "add_input"
    view.set_inputs({"y": d.y, "z": added})
    assert counted(), "set_inputs"
    view.set_outputs({"result": built})
    assert counted(), "set_outputs"
