"""Every op of the vocabulary on both graph kinds: decoded as built, typed as computed, run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from graphwright.ir.core.errors import InvalidGraph, Refusal
from graphwright.ir.core.types import Type, agree
from graphwright.ir.core.view import Source, View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.lower import lower
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.vocab import (
    END,
    REQUIRED,
    VOCABULARY,
    complete_attrs,
    is_known,
    ops_with,
    spec,
    traits,
)
from graphwright.ir.vocab.rules import promote
from onnx_ir.tensor_adapters import from_torch_dtype
from torch._subclasses import FakeTensorMode

KINDS = ("fx", "onnx")


@dataclass(frozen=True)
class Case:
    """Operands (tensors become inputs) and attributes of one use of an op."""

    op: str
    operands: tuple[Any, ...]
    attrs: dict[str, Any]
    stored: bool = False
    """Whether the first operand is a weight."""


def _t(*shape: int, seed: int = 0, low: float = 0.1, high: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.rand(shape, generator=generator) * (high - low) + low


def _s(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of both signs."""
    return _t(*shape, seed=seed, low=-2.0, high=2.0)


def _i(*shape: int, high: int, low: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def _b(*shape: int) -> torch.Tensor:
    return _i(*shape, high=2) == 1


def _cases() -> dict[str, list[Case]]:
    """One use of each op, and a second one where a form of its own is built for it."""
    cases: dict[str, list[Case]] = {}

    def add(op: str, *operands: Any, stored: bool = False, **attrs: Any) -> None:
        cases.setdefault(op, []).append(Case(op, operands, attrs, stored))

    for op in ("add", "sub", "mul", "div", "pow", "maximum", "minimum"):
        add(op, _t(3, 1, 5), _t(123, 1))
    for op in ("eq", "ne", "lt", "le", "gt", "ge"):
        add(op, _i(7, high=4), _i(3, 7, high=4))
        add(op, _t(5, 3), 0.5)
    for op in ("add", "div"):
        add(op, _i(5, high=9, low=-9), 2)
    for op in ("sub", "pow"):
        add(op, 2.0, _t(5))
    for op in ("neg", "abs", "erf", "tanh", "sigmoid", "sin", "cos", "floor", "relu", "silu",
               "identity", "exp"):  # fmt: skip
        add(op, _s(3, 5))
    for op in ("sqrt", "rsqrt", "reciprocal", "log"):
        add(op, _t(123))
    add("gelu", _s(5, 7))
    add("gelu", _s(5, 7), approximate="tanh")
    add("clamp", _s(5, 7), min=-0.5)
    for op in ("logical_and", "logical_or"):
        add(op, _b(3, 5), _b(5))
    add("logical_not", _b(3, 5))
    add("isnan", torch.tensor([1.0, float("nan"), float("inf")]))
    add("cast", _s(3, 5), dtype=torch.int32)
    add("where", _b(3, 5), _t(5), 0.25)
    for op in ("mean", "sum", "amax", "amin"):
        add(op, _s(3, 5, 7), dims=(0, -1), keepdim=True)
    for op in ("softmax", "cumsum"):
        add(op, _s(3, 5), dim=-1)
    add("matmul", _s(2, 1, 3, 5), _s(4, 5, 1))
    add("linear", _s(2, 3, 5), _s(7, 5), _s(7))
    window = {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 1), "groups": 1}
    add("conv", _s(2, 3, 9, 7), _s(5, 3, 3, 2), _s(5), **window)
    add("embedding", _s(11, 5), _i(2, 3, high=11), stored=True)
    add("layer_norm", _s(3, 5, 7), _s(5, 7, seed=1), dims=2, eps=1e-3)
    add("layer_norm", _s(3, 5))
    add("rms_norm", _s(3, 5), _s(5, seed=1), eps=1e-5)
    q, k, v = _s(2, 4, 3, 8), _s(2, 4, 5, 8, seed=1), _s(2, 4, 5, 8, seed=2)
    add("sdpa", q, k, v, _s(3, 5), scale=0.25)
    add("sdpa", q, k, v, _b(2, 1, 1, 5) | torch.tensor([True, False, False, False, False]))
    add("sdpa", q, k, v, _s(3, 5), scale=0.25, softcap=1.5)
    add("sdpa", k, k[:, :2], v[:, :2], causal=True, gqa=True)
    add("reshape", _s(3, 4, 5), -1, 2)
    add("reshape", _s(0, 4, 5), 3, 0, 4, allowzero=True)
    add("expand", _s(3, 1), 2, -1, 5)
    add("transpose", _s(2, 3, 5), perm=(2, 0, 1))
    add("unsqueeze", _s(3, 5), dims=(1,))
    add("squeeze", _s(3, 1, 5, 1), dims=(1, 3))
    add("concat", _s(3, 5), _s(3, 1), _s(3, 2), dim=1)
    add("slice", _s(7, 5), 1, 6, dim=0, step=2)
    add("slice", _s(7, 5), -3, END, dim=1)
    add("gather", _s(3, 5), _i(3, 2, high=5), dim=1)
    add("index_select", _s(3, 5), _i(4, high=5), dim=1)
    add("split", _s(3, 7), sizes=(1, 4, 2), dim=1)
    add("split", _s(3, 7), sizes=(3,), dim=0)
    add("topk", _s(3, 7), k=3, dim=0, largest=False)
    add("arange", 1, 8, 3, dtype=torch.int64)
    add("size", _s(3, 5), dim=1)
    return cases


CASES = _cases()
OPS = sorted(CASES)


def build_case(kind: str, case: Case) -> tuple[View, dict[str, torch.Tensor], list[Any]]:
    """A graph that holds the op alone, the inputs to run it on, and the operands it was given."""
    stored = {0} if case.stored else set()
    tensors = {i: o for i, o in enumerate(case.operands) if isinstance(o, torch.Tensor)}
    inputs = {f"x{i}": o for i, o in tensors.items() if i not in stored}
    inputs = inputs or {"unused": torch.ones(1)}
    count = len(_reference(case))
    view = _empty(kind, inputs, count)
    values = dict(zip(inputs, view.inputs(), strict=True))
    values |= {f"x{i}": view.add_weight(f"w{i}", MemoryWeight(tensors[i])) for i in stored}
    operands = [values.get(f"x{i}", o) for i, o in enumerate(case.operands)]
    end = view.graph.output(()) if isinstance(view, FxView) else _onnx_end(view)
    first = view.build(case.op, operands, case.attrs, before=end)
    results = view.results(view.producer(first))
    assert len(results) == count
    if isinstance(view, FxView):
        view.set_outputs(dict(zip(_names(count), results, strict=True)))
        end.args = (results,)
        view = FxView(view.graph, None, view._weights, (tuple(inputs), _names(count)), Source(), {})
    else:
        view.erase(end)
        view.model.graph.outputs.extend(results)
    return view, inputs, operands


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"out{i}" for i in range(count))


def _empty(kind: str, inputs: dict[str, torch.Tensor], outputs: int) -> Any:
    if kind == "fx":
        graph, mode = torch.fx.Graph(), FakeTensorMode()
        for name, tensor in inputs.items():
            graph.placeholder(name).meta["val"] = mode.from_tensor(tensor)
        output = graph.output(())
        view = FxView(graph, None, {}, (tuple(inputs), _names(outputs)), Source(), {})
        graph.erase_node(output)
        return view
    values = [
        onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(from_torch_dtype(tensor.dtype)),
            shape=onnx_ir.Shape(tensor.shape),
        )
        for name, tensor in inputs.items()
    ]
    graph = onnx_ir.Graph(values, [], nodes=[], opset_imports={"": 20}, name="case")
    return OnnxView(onnx_ir.Model(graph, ir_version=10))


def _onnx_end(view: OnnxView) -> onnx_ir.Node:
    end = onnx_ir.Node("", "Identity", [view.model.graph.inputs[0]], name="end")
    view.model.graph.append(end)
    return end


def _value(case: Case) -> Any:
    return spec(case.op).reference(*case.operands, **complete_attrs(case.op, case.attrs))


def _reference(case: Case) -> tuple[Any, ...]:
    value = _value(case)
    values = value if isinstance(value, tuple) else (value,)
    return tuple(torch.as_tensor(v) for v in values)


def test_every_native_op_has_a_case() -> None:
    assert set(OPS) == set(ops_with(lambda op: op.aten))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_what_was_built_is_decoded_and_computes_the_reference(op: str, kind: str) -> None:
    for case in CASES[op]:
        view, inputs, operands = build_case(kind, case)
        check_structure(view)
        outputs = sweep(view, inputs).values()
        for actual, expected in zip(outputs, _reference(case), strict=True):
            torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=2e-6, atol=2e-6)
        reading = view.read(view.producer(view.outputs()[0]))
        assert reading is not None
        if (kind, op) == ("onnx", "ne"):
            assert reading[0] == "logical_not"  # ONNX has no NotEqual: the op is Not(Equal)
            continue
        assert reading[0] == op
        assert len(reading[1]) == len(operands)
        for actual, operand in zip(reading[1], operands, strict=True):
            assert actual is operand or _is_number(view, actual, operand)
        assert _from_the_left(reading[2], case) == _from_the_left(
            complete_attrs(op, case.attrs), case
        )


def _is_number(view: View, actual: Any, operand: Any) -> bool:
    """Whether an operand is the number that was given, as the graph writes it."""
    if not isinstance(operand, int | float):
        return False
    number = view.number(actual)
    if number is None:  # ATen has no such scalar overload: a tensor full of it stands there
        maker = view.producer(actual)
        return view.native_op(maker) == "aten.full_like.default" and maker.args[1] == operand
    return number == operand or {number, operand} == {1, -1}  # of ``expand``: both keep a dimension


def _from_the_left(attrs: Mapping[str, Any], case: Case) -> dict[str, Any]:
    rank = case.operands[0].dim() if isinstance(case.operands[0], torch.Tensor) else 0
    normal = dict(attrs)
    if "dim" in normal:
        normal["dim"] %= rank
    if "dims" in normal and isinstance(normal["dims"], tuple):
        normal["dims"] = tuple(sorted(d % rank for d in normal["dims"]))
    return normal


@pytest.mark.parametrize("op", OPS)
def test_type_rule_says_what_the_reference_makes(op: str) -> None:
    for case in CASES[op]:
        attrs = complete_attrs(op, case.attrs)
        actual = tuple(Type(t.dtype, tuple(t.shape)) for t in _reference(case))
        types = [
            Type(o.dtype, tuple(o.shape)) if isinstance(o, torch.Tensor) else o
            for o in case.operands
        ]
        assert spec(op).infer(types, attrs) == actual
        # With names for the first dimensions it may say less, and nothing else.
        named = [
            t.with_shape([f"n{t.shape[0]}", *t.shape[1:]])
            if isinstance(t, Type) and t.rank and t.shape[0] > 1
            else t
            for t in types
        ]
        for inferred, type_ in zip(spec(op).infer(named, attrs), actual, strict=True):
            assert agree(inferred, type_)
        view, _, _ = build_case("onnx", case)
        for value, type_ in zip(view.outputs(), actual, strict=True):
            assert view.type(value) == type_


@pytest.mark.parametrize("op", OPS)
def test_lowered_it_runs_in_onnx_runtime(op: str) -> None:
    for case in CASES[op]:
        view, inputs, _ = build_case("onnx", case)
        assert isinstance(view, OnnxView)
        lower(view)
        proto = onnx_ir.to_proto(view.model).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        fed = {i.name for i in session.get_inputs()}
        outputs = session.run(None, {n: t.numpy() for n, t in inputs.items() if n in fed})
        for expected, actual in zip(_reference(case), outputs, strict=True):
            torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=2e-5, atol=2e-5)


def test_a_layer_norm_of_an_unknown_shape_is_not_lowered() -> None:
    view, _, (x,) = build_case("onnx", Case("layer_norm", (_s(3, 5),), {}))
    x.shape = None
    with pytest.raises(InvalidGraph, match="dimensions of unknown size"):
        lower(view)


def test_promotion_is_that_of_torch() -> None:
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32)
    some = [torch.ones(shape, dtype=dtype) for dtype in dtypes for shape in ((), (2,))]
    for a, b in itertools.product(some, [*some, True, 2, 2.5]):
        kinds = [
            Type(x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for x in (a, b)
        ]
        assert promote(kinds) == promote(kinds[::-1]) == torch.result_type(a, b), kinds


def test_attributes_are_completed_and_checked() -> None:
    assert complete_attrs("gelu", None) == {"approximate": "none"}
    assert complete_attrs("add", {}) == {}
    with pytest.raises(TypeError, match="softmax needs the attribute dim"):
        complete_attrs("softmax", None)
    with pytest.raises(TypeError, match="add has no attribute alpha"):
        complete_attrs("add", {"alpha": 2})


def test_arity_follows_the_signature() -> None:
    assert spec("linear").arity == (2, 3)
    assert spec("concat").arity == (0, None)
    assert spec("reshape").arity == (1, None)
    assert spec("sdpa").arity == (3, 4)


def test_own_ops_belong_to_the_vocabulary() -> None:
    assert is_known("linear_nbit") and spec("linear_nbit").own
    assert not is_known("frobnicate")
    with pytest.raises(KeyError):
        spec("frobnicate")


def test_required_is_told_apart_from_none() -> None:
    assert VOCABULARY["clamp"].attrs["min"] is None
    assert VOCABULARY["softmax"].attrs["dim"] is REQUIRED
    assert repr(REQUIRED) == "REQUIRED"


def test_traits_agree_with_each_other() -> None:
    # What multiplies by a weight is heavy: a matmul of two computed operands need not be.
    counted = set(ops_with(lambda op: op.macs))
    assert counted - set(ops_with(lambda op: op.heavy)) == {"matmul"}
    stored = set(ops_with(lambda op: op.stored_linear))
    assert stored >= {"linear_bitstack", "linear_nbit"}
    assert stored <= counted & set(ops_with(lambda op: op.dense and op.heavy))
    assert set(ops_with(lambda op: op.is_linear)) == {"linear", *stored}
    several = {op for op in OPS if isinstance(_value(CASES[op][0]), tuple)}
    assert set(ops_with(lambda op: op.multi_result)) == several
    assert all(len(spec(op).operands) == 2 for op in ops_with(lambda op: op.commutative))
    assert not traits("native").pure
    with pytest.raises(KeyError):
        spec("native")


@pytest.mark.parametrize("op", [c for c in OPS if spec(c).commutative])
def test_operands_of_commutative_ops_change_places(op: str) -> None:
    a, b = CASES[op][0].operands
    assert torch.equal(spec(op).reference(a, b), spec(op).reference(b, a))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_a_wrong_number_of_operands_is_refused(kind: str, count: int) -> None:
    view = _empty(kind, {"x": _s(3, 5)}, 1)
    x = view.inputs()[0]
    end = view.graph.output((x,)) if isinstance(view, FxView) else _onnx_end(view)
    with pytest.raises(Refusal, match=f"linear takes 2 to 3 operands, not {count}"):
        view.build("linear", [x] * count, before=end)


@pytest.mark.parametrize("kind", KINDS)
def test_operands_that_do_not_fit_are_refused(kind: str) -> None:
    view = _empty(kind, {"x": _s(3, 5), "w": _s(7, 4)}, 1)
    x, w = view.inputs()
    end = view.graph.output((x,)) if isinstance(view, FxView) else _onnx_end(view)
    with pytest.raises(Refusal, match="does not fit its operands"):
        view.type(view.build("linear", [x, w], before=end))


def test_integers_and_floats_mix_in_fx_only() -> None:
    ids = _i(3, 5, high=9)
    case = Case("div", (ids, 2.5), {})
    view, inputs, _ = build_case("fx", case)
    assert view.op(view.producer(view.outputs()[0])) == "div"
    torch.testing.assert_close(sweep(view, inputs)["out0"], ids / 2.5)
    with pytest.raises(Refusal, match=r"the number 2.5 meets a tensor of int64: cast it first"):
        build_case("onnx", case)


def test_a_true_division_of_integers_is_native_in_fx() -> None:
    view = _empty("fx", {"x": _i(3, high=9), "y": _i(3, high=9, low=1)}, 1)
    x, y = view.inputs()
    node = view.graph.call_function(torch.ops.aten.div.Tensor, (x, y))
    assert view.op(node) == "native"
    assert view.native_op(node) == "aten.div.Tensor"


def test_a_masked_fill_is_a_choice_unless_it_cuts_a_number_off() -> None:
    view = _empty("fx", {"x": _i(3, high=9), "y": _t(3), "seen": _b(3)}, 1)
    x, y, mask = view.inputs()
    fill = torch.ops.aten.masked_fill.Scalar
    fills = [view.graph.call_function(fill, args) for args in ((y, mask, 0.5), (x, mask, 0.5))]
    assert [view.op(node) for node in fills] == ["where", "native"]
    assert view.operands(fills[0]) == (mask, 0.5, y)


def _f32(*shape: int) -> Type:
    return Type(torch.float32, shape)


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "reason"),
    [
        ("add", (_f32(3, 5), _f32(3, 4)), {}, "do not broadcast"),
        ("matmul", (_f32(3, 5), _f32(4, 7)), {}, "inner dimensions 5 and 4 differ"),
        ("linear", (_f32(3, 5), _f32(7, 4)), {}, "inner dimensions 5 and 4 differ"),
        ("split", (_f32(3, 5),), {"sizes": (2, 2), "dim": 1}, r"\(2, 2\) do not add up to 5"),
        ("concat", (_f32(3, 5), _f32(4, 5)), {"dim": 1}, "the other dimensions 3 and 4 differ"),
        ("reshape", (_f32(3, 5), 4, 4), {}, "has not the elements of"),
        ("reshape", (_f32(3, 5), -1, 4), {}, "has not the elements of"),
        ("topk", (_f32(3, 5),), {"k": 6}, "k=6 of 5"),
        ("sdpa", (_f32(1, 3, 8), _f32(1, 5, 4), _f32(1, 5, 4)), {}, "inner dimensions 8 and 4"),
        ("sdpa", (_f32(1, 3, 8), _f32(1, 5, 8), _f32(1, 4, 8)), {}, "token dimensions 5 and 4"),
    ],
)
def test_contradicting_operands_have_no_type(
    op: str, operands: tuple[Any, ...], attrs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        spec(op).infer(operands, complete_attrs(op, attrs))
