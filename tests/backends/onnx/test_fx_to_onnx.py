"""FX graphs as ONNX graphs, node by node: numbers, names, and no weight touched on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.aten import FORMS, Emit
from graphwright.backends.onnx.fx_to_onnx import OPSET, TRANSLATION_KEY
from graphwright.backends.onnx.lowering import lowered, translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Refusal
from graphwright.ir.core.tensors import WeightTensor
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import ComputedWeight, MemoryWeight, Weight
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.parts import End
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize

from ..held_to_torch import (
    TOLERANCE,
    Attentions,
    SumOfDtypes,
    attentions,
    expected_attentions,
    run,
    runner,
)

RELATIVE = 1e-5


def agrees(view: FxView, onnx: View, *batches: Mapping[str, torch.Tensor]) -> None:
    """``onnx``, translated from ``view``, gives in ONNX Runtime what the FX graph gives."""
    model = lowered(onnx).model
    sessions = [runner(model, optimize=optimize) for optimize in (True, False)]
    for batch in batches:
        expected = sweep(view, batch)
        for session in sessions:
            actual = session(batch)
            assert set(actual) == set(expected)
            for name, value in expected.items():
                assert actual[name].shape == value.shape, name
                assert actual[name].dtype == value.dtype, name
                error = (actual[name].double() - value.double()).norm()
                assert error <= RELATIVE * value.double().norm(), name


def refusing(weight: Weight) -> Weight:
    def read() -> torch.Tensor:
        raise AssertionError("a weight was read while the graph was translated")

    return ComputedWeight(read, weight.shape, weight.dtype, ("refusing", weight.key))


def test_no_weight_is_read_renamed_or_merged(view: FxView) -> None:
    assert view.program is not None
    sealed = {name: refusing(weight) for name, weight in view.weights().items()}
    opaque = FxView.from_program(view.program, weights=sealed, dim_names=view.symbols)
    initializers = translated(opaque).model.graph.initializers
    assert {name for name in sealed if name not in initializers} == set()
    assert "out.bias" in initializers and "norm.bias" in initializers
    for name, weight in sealed.items():
        tensor = initializers[name].const_value
        assert isinstance(tensor, WeightTensor) and tensor.raw is weight


def test_a_handle_of_another_shape_is_refused(view: FxView) -> None:
    assert view.program is not None
    weights = {**view.weights(), "out.bias": MemoryWeight(torch.zeros(25))}
    wrong = FxView.from_program(view.program, weights=weights)
    with pytest.raises(BadInput, match=r"out\.bias: the graph has \[24\]"):
        translated(wrong)


def test_dimensions_keep_their_names(view: FxView) -> None:
    model = translated(view).model
    assert model.graph.opset_imports[""] == OPSET
    assert [str(v.shape) for v in model.graph.inputs] == ["[batch,seq]"] * 2
    assert [v.name for v in model.graph.outputs] == ["states", "kept"]
    assert str(model.graph.outputs[0].shape) == "[batch,seq,24]"
    shapes = {str(v.shape) for n in model.graph for v in n.outputs if v.shape is not None}
    assert "[batch,3,seq,8]" in shapes
    assert not [s for s in shapes if any(symbol in s for symbol in view.symbols)]


@pytest.mark.parametrize("optimize", [True, False])
def test_numbers_on_odd_shapes(
    encoder: torch.nn.Module, view: FxView, inputs_of: Callable[..., Any], optimize: bool
) -> None:
    model = lowered(view).model
    for batch, seq in [(1, 1), (3, 5), (2, 123)]:
        inputs = inputs_of(batch, seq)
        actual = run(model, inputs, optimize=optimize)
        expected = encoder(**inputs)
        torch.testing.assert_close(
            actual["states"], expected["states"], rtol=TOLERANCE, atol=TOLERANCE
        )
        assert torch.equal(actual["kept"], expected["kept"])


def other_sizes(small: Any) -> list[dict[str, torch.Tensor]]:
    """The example and others: one row, one token, padding on the left."""
    rng = torch.Generator().manual_seed(5)
    batches = [small.inputs]
    for rows, tokens in ((1, 1), (3, 5), (2, 31)):
        if "input_ids" not in small.inputs:
            shape = small.inputs["pixel_values"].shape[1:]
            batches.append({"pixel_values": torch.randn(rows, *shape, generator=rng)})
            continue
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[-1, : tokens // 3] = 0
        ids = torch.randint(0, 97, (rows, tokens), generator=rng)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


FAMILIES = (
    "llama", "qwen2", "gemma2", "gpt2", "opt", "bert", "clip_vision", "vit", "t5_encoder",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(models: ModuleType, family: str) -> None:
    """Other sizes than the example's; the same sites; as traced and raised."""
    assert set(FAMILIES) == set(models.BUILDERS)
    small = models.BUILDERS[family](layers=1)
    view, raised = models.plain(small), models.traced(small)
    batches = other_sizes(small)
    agrees(raised, translated(raised), *batches)
    onnx = translated(view)
    agrees(view, onnx, batches[0])
    canonicalize(onnx)
    assert sites(onnx) == sites(raised)
    assert TRANSLATION_KEY not in onnx.metadata()


def sites(view: View) -> list[str]:
    structure = recognize(view)
    named = [*structure.linears, *structure.embeddings]
    return [site.name for site in named] + [site.q for site in structure.attentions]


def test_a_layer_adds_no_shape_arithmetic(models: ModuleType) -> None:
    """Sizes are taken once: each layer adds its own nodes alone, and as many as the one before."""
    counts = []
    for layers in (1, 2):
        small = models.llama(layers=layers)
        onnx = translated(models.traced(small))
        ops = [onnx.op(node) for node in onnx.nodes()]
        counts.append((len(ops), ops.count("size")))
    (one, sizes), (two, last) = counts
    assert two - one <= 31
    assert sizes == last == 2


def test_attention_as_in_torch_where_a_query_sees_nothing() -> None:
    inputs = attentions()
    expected = expected_attentions(inputs)
    view = trace(Attentions(), (), inputs, dynamic_shapes={})
    model = lowered(view).model
    for optimize in (True, False):
        outputs = run(model, inputs, optimize=optimize)
        for kind, actual in zip(expected, outputs.values(), strict=True):
            torch.testing.assert_close(actual, expected[kind], rtol=TOLERANCE, atol=TOLERANCE)


class Calls(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class All(torch.nn.Module):
    """Functions of one value as a module: a result for each, by its name."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor) -> Any:
        return {name: function(x) for name, function in self.functions.items()}


F = torch.nn.functional
NATIVES: dict[str, Callable[..., Any]] = {
    "filled": lambda x: x + x.new_ones(x.shape) * x.new_full((x.shape[0], 1, 1), 3.0),
    "filled like": lambda x: torch.full_like(x, 2.5) + torch.ones_like(x) + torch.zeros_like(x[:1]),
    "filled with a size": lambda x: x * torch.full((3, 1), x.shape[0]) + torch.tensor(1.5),
    "counted in floats": lambda x: x * torch.arange(x.shape[0], dtype=torch.float32)[:, None, None],
    "sizes": lambda x: x.reshape(x.shape[0] * 3, -1) * ((x.shape[0] + 5) // 2 - x.shape[0] % 3),
    "one index": lambda x: x[:, torch.tensor([2, 0])],
    "indices in front": lambda x: x[torch.tensor([[0], [1]]), torch.tensor([2, 0, 1])],
    "indices behind": lambda x: x[:, torch.tensor([[2], [0]]), torch.tensor([3, 1])],
    "indices apart": lambda x: x[torch.tensor([1, 0]), :, torch.tensor([3, 1])],
    "a place": lambda x: x[0] + x[:, -1].sum() + x.select(2, 1).mean(),
    "parts": lambda x: sum(x.unbind(1)) * torch.stack([x[:, 0], x[:, 1]], -1).sum(),
    "repeated": lambda x: x.repeat(1, 2, 1).repeat(2, 1, 1, 1),
    "rolled": lambda x: x.roll((1, -1), (1, 2)).flip(2),
    "padded": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "triangles": lambda x: x.tril() - x.triu(1),
    "whole numbers": lambda x: (x * 9).to(torch.int64) // 4 + (x * 9).to(torch.int64) % 4,
    "divided": lambda x: (x * 9).to(torch.int64) / 4 + torch.div(x, 0.3, rounding_mode="floor"),
    "mixed dtypes": lambda x: (x > 0) * x + (x > 0).sum(1, keepdim=True) + (x > 0).to(torch.int32),
    "compared": lambda x: (x.to(torch.int64) < 0.5) | (x.to(torch.int32) == x.to(torch.int64)),
    "chosen": lambda x: torch.where(x > 0, 1.0, 0.0) + torch.where(x > 0, x, 0.0),
    "bools": lambda x: (x > 0).any(1) & ~(x < 9).all(1) | ((x > 1) ^ (x > 0))[:, 0],
    "remainders": lambda x: x % 0.7 + torch.remainder((x * 9).int(), 5),
    "norms": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) + x.norm(),
    "extremes": lambda x: torch.max(x, x.flip(1)) + torch.min(x, x.argmax(2, keepdim=True)),
    "curves": lambda x: F.leaky_relu(x) + F.elu(x) + F.hardtanh(x) + x.ceil() * x.sign(),
    "wide softmax": lambda x: x.softmax(-1, dtype=torch.float64) + x.log_softmax(1),
    "soft steps": lambda x: F.softplus(x * 9) + F.softplus(x, beta=2.0),
    "between tensors": lambda x: (
        x.clamp(x[:1] - 1, x[:, :1]), x.clamp(min=x[:1]), x.clamp(max=torch.tensor(0))),
    "each twice": lambda x: (x.repeat_interleave(2, 0), x.repeat_interleave(3, -2)),
    "scaled sums": lambda x: torch.add(x, x, alpha=2) - torch.rsub(x, 3),
    "means by place": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "mean")
    + x.scatter_reduce(1, (x > 0).long(), x, "mean", include_self=False),
    "pooled": lambda x: F.adaptive_avg_pool2d(x[:, None], 1),
    "batch norm": lambda x: F.batch_norm(
        x, torch.arange(3.0), torch.ones(3) * 2, torch.ones(3), torch.zeros(3)
    ),
    "batch norm of itself": lambda x: F.batch_norm(
        x, None, None, torch.ones(3) * 2, torch.arange(3.0), training=True
    ),
    "members": lambda x: torch.isin((x * 9).to(torch.int64), torch.tensor([1, -3, 7])),
    "no members": lambda x: torch.isin(x.to(torch.int64), torch.tensor([[0], [9]]), invert=True),
    "a linear of a vector": lambda x: F.linear(x, torch.arange(4.0)),
    "padding that keeps the size": lambda x: F.conv1d(x, torch.ones(2, 3, 4) * 0.5, padding="same"),
    "transposed convolution": lambda x: F.conv_transpose1d(x, torch.ones(3, 2, 2) * 0.5, stride=2),
}


def test_native_ops_have_forms_of_their_own() -> None:
    rng = torch.Generator().manual_seed(2)
    view = trace(All(NATIVES), (torch.randn(2, 3, 4, generator=rng),))
    onnx = translated(view)
    assert TRANSLATION_KEY not in onnx.metadata()
    agrees(view, onnx, *({"x": torch.randn(n, 3, 4, generator=rng)} for n in (2, 5)))


WHOLE: dict[str, Callable[..., Any]] = {
    "a threshold that is a tensor": lambda n: (n < n.float().mean(), n == torch.tensor(2.5)),
    "a threshold of another kind": lambda n: ((n > 0) == 2, (n > 0) < 2, n >= 0.5),
    "numbers that wrap around": lambda n: (n.abs().to(torch.uint8) > -3, n.to(torch.int8) < 200),
    "the number in a tensor": lambda n: (n * n.float().mean().item(), n + n.sum().item()),
    "casts of constants": lambda n: torch.tensor(3) / torch.tensor(2) + n.float(),
    "places that count down": lambda n: n[torch.arange(n.shape[0] - 1, -1, -1)],
    "steps written as floats": lambda n: torch.arange(0, n.shape[0] * 4, 2.0, dtype=torch.int64),
    "whole means by place": lambda n: n.scatter_reduce(1, (n > 0).long(), n, "mean"),
    "places from the end": lambda n: n[torch.arange(-n.shape[0], 0)],
    "bools in order": lambda n: ((n > 0) < (n > 1), (n > 0) >= (n < 2), (n > 0) > 0),
    "extremes of bools": lambda n: (torch.maximum(n > 1, n < 0), torch.min(n > 0, n < 2)),
    "bools chosen": lambda n: torch.where(n > 0, n > 1, n < -1),
    "a triangle of a computed place": lambda n: n.float()[:, 0].tril(n.shape[0] - 2),
    "triangles of small numbers": lambda n: (n.int().tril(), n.char().triu(), (n > 0).tril()),
    "functions of whole numbers": lambda n: (n.relu(), n.floor(), n.ceil(), n.round()),
    "a dimension that stays": lambda n: (n.squeeze(1), n[:, :1].squeeze(1), n.squeeze((0, 2))),
    "any and all of nothing": lambda n: (n[:, 3:].any(1), (n[:, 3:] > 0).all(1)),
    "remainders by what is far": lambda n: n.float().abs() % float("inf"),
    "signs of remainders": lambda n: (n % 0.7, n % -1.5, n.float() % (n - 0.5), (n * 1.5) % -3),
    "a norm beyond half precision": lambda n: torch.linalg.vector_norm(
        n.half() * 300, dim=-1
    ).float(),
}  # fmt: skip
"""Of whole numbers of both signs, ``n``: i64 [batch, 3, 4]."""


def test_whole_numbers_and_bools_as_in_torch() -> None:
    rng = torch.Generator().manual_seed(4)
    view = trace(All(WHOLE), (torch.randint(-4, 5, (2, 3, 4), generator=rng),))
    onnx = translated(view)
    assert TRANSLATION_KEY not in onnx.metadata()
    batches = ({"x": torch.randint(-4, 5, (n, 3, 4), generator=rng)} for n in (2, 5))
    agrees(view, onnx, *batches)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "aten.div.Tensor_mode": (
        lambda x: torch.div(x, 2, rounding_mode="trunc"),
        " (division of floats that rounds towards zero)",
    ),
    "aten.native_layer_norm.default": (
        lambda x: torch.native_layer_norm(x, [4], None, None, 1e-5),
        " (results beside the first are read)",
    ),
    "aten.sinh.default": (lambda x: x.relu().sinh() + 1, " (half way)"),
    "aten.max_pool2d.default": (lambda x: F.max_pool2d(x.relu()[:, None], 2).sum(1), ""),
}
"""By op: a function that calls it, and why it has no form, where a form says so."""


def test_what_has_no_form_goes_through_the_exporter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the form of sinh has built before it refuses goes; the nodes around an op stay ours."""

    def form(e: Emit, x: Any) -> Any:
        e.exp(e.neg(x))
        raise Refusal("half way", e.node)

    monkeypatch.setitem(FORMS, torch.ops.aten.sinh.default, form)
    functions = {op: function for op, (function, _) in REFUSED.items()}
    view = trace(All(functions), (torch.randn(2, 3, 4),))
    onnx = translated(view)
    assert onnx.metadata()[TRANSLATION_KEY].splitlines() == [
        f"{op} went through torch.onnx{reason}" for op, (_, reason) in REFUSED.items()
    ]
    ops = [onnx.op(node) for node in onnx.nodes()]
    assert "relu" in ops and not {"exp", "neg"} & set(ops)
    agrees(view, onnx, {"x": torch.randn(2, 3, 4) * 5}, {"x": torch.randn(5, 3, 4) * 5})


def test_a_fill_of_an_unknown_shape_is_refused(view: FxView) -> None:
    """It is not a tensor without dimensions."""
    onnx, node = translated(view), next(iter(view.nodes()))
    x = onnx.inputs()[0]
    x.shape = None
    emit = Emit(onnx, node, End(onnx.model.graph, "new", {}), view.type(node))
    with pytest.raises(Refusal, match="is not known"):
        FORMS[torch.ops.aten.zeros_like.default](emit, x)


def test_complex_numbers_send_the_whole_graph_through_the_exporter() -> None:
    turn = torch.polar(torch.ones(2), torch.tensor([0.3, 1.1]))
    module = Calls(
        lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 3, 2, 2)) * turn)
    )
    view = trace(module, (torch.randn(2, 3, 4),))
    onnx = translated(view)
    remark = onnx.metadata()[TRANSLATION_KEY]
    assert remark.startswith("the whole graph went through torch.onnx:") and "complex" in remark
    x = torch.randn(5, 3, 4)
    actual = run(lowered(onnx).model, {"x": x})["output"]
    torch.testing.assert_close(actual, module(x), rtol=TOLERANCE, atol=TOLERANCE)


class Inner(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.head = Calls(function)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(x)


def test_an_op_without_onnx_form_is_named_with_its_module() -> None:
    view = trace(Inner(lambda x: torch.linalg.eigh(x)[0]), (torch.eye(3),), dynamic_shapes={})
    with pytest.raises(BadInput, match=r"_linalg_eigh has no ONNX form .*module head of class"):
        translated(view)


def test_a_custom_op_is_named_with_what_would_help() -> None:
    with torch.library._scoped_library("othertools", "FRAGMENT") as library:
        library.define("grouped_mm(Tensor x) -> Tensor")
        library.impl("grouped_mm", lambda x: x.clone(), "CompositeExplicitAutograd")
        module = Inner(lambda x: torch.ops.othertools.grouped_mm(x))
        view = trace(module, (torch.eye(3),), dynamic_shapes={})
        with pytest.raises(BadInput) as refusal:
            translated(view)
    message = str(refusal.value)
    assert "othertools::grouped_mm has no ONNX form" in message
    assert "module head of class Calls" in message
    assert "a custom op of 'othertools'" in message
    assert 'experts_implementation="eager"' in message and "backend='eager'" in message


def test_own_ops_become_nodes_of_our_domain(view: FxView) -> None:
    """With the rule that made them and the module that they stand in."""
    edited = view.copy()
    node = next(n for n in edited.nodes() if edited.op(n) == "linear")
    with edited.made_by("a-rule", step=3):
        index = edited.build("cumsum", [edited.inputs()[1]], {"dim": 1}, before=node)
        chosen = edited.build("token_select", [edited.operands(node)[0], index], before=node)
    edited.set_operand(node, 0, chosen)
    onnx = translated(edited)
    (selecting,) = (n for n in onnx.nodes() if onnx.op(n) == "token_select")
    assert (selecting.domain, selecting.op_type) == ("graphwright", "token_select")
    assert onnx.name(selecting) == chosen.name
    assert selecting.metadata_props["graphwright.rule"] == "a-rule"
    assert selecting.metadata_props["graphwright.pass"] == "3"
    (linear,) = (n for n in onnx.nodes() if onnx.op(n) == "linear" and n.inputs[0] is
                 selecting.outputs[0])  # fmt: skip
    assert onnx.scope(linear) == edited.scope(node) != ""
    assert "graphwright.rule" not in linear.metadata_props


def test_outputs_that_are_the_same_value_or_an_input() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = x * 2
            return {"a": y, "b": y, "c": x.clone()}

    view = trace(Twice(), (torch.ones(3),), dynamic_shapes={})
    out = run(translated(view).model, {"x": torch.tensor([1.0, 2.0, 3.0])})
    assert list(out) == ["a", "b", "c"]
    assert out["a"].tolist() == out["b"].tolist() == [2.0, 4.0, 6.0]
    assert out["c"].tolist() == [1.0, 2.0, 3.0]


def test_the_graph_is_left_as_it_was(view: FxView) -> None:
    before = [(n.name, n.target, n.args) for n in view.graph.nodes]
    translated(view)
    assert [(n.name, n.target, n.args) for n in view.graph.nodes] == before


def test_the_same_bytes_each_time(view: FxView) -> None:
    first, second = (
        onnx_ir.serde.serialize_model(translated(view).model).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second


def test_every_dtype_of_a_weight_survives() -> None:
    module = SumOfDtypes()
    x = torch.ones(2, 3)
    view = trace(module, (x,), dynamic_shapes={})
    handles = translated(view).weights()
    assert {w.dtype for w in handles.values()} >= {torch.float32}
    torch.testing.assert_close(run(lowered(view).model, {"x": x})["output"], module(x))


def test_what_has_no_form_and_is_made_of_constants_is_computed() -> None:
    """As Gemma 3n's cutoff is, by the inverse of a normal distribution."""

    class Cut(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x - torch.distributions.Normal(0, 1).icdf(torch.tensor(0.8)))

    view = trace(Cut(), torch.randn(2, 3))
    agrees(view, translated(view), {"x": torch.randn(4, 3)})
