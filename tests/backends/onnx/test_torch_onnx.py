"""Whole programs by torch's exporter: numbers, names, and no weight touched on the way."""

from __future__ import annotations

from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.torch_onnx import to_onnx
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.tensors import WeightTensor
from graphwright.ir.core.weights import ComputedWeight, MemoryWeight, Weight
from graphwright.ir.fx.view import FxView

from ..held_to_torch import (
    TOLERANCE,
    Attentions,
    SumOfDtypes,
    attentions,
    expected_attentions,
    run,
)


def exported(module: torch.nn.Module, args: tuple[Any, ...], **more: Any) -> onnx_ir.Model:
    program = torch.export.export(module.eval(), args, **more).run_decompositions({})
    tensors = {**program.state_dict, **program.constants}
    names = [f"in{i}" for i in range(len(program.graph_signature.user_inputs))]
    return to_onnx(program, {n: MemoryWeight(t) for n, t in tensors.items()}, names, ["out"])


class Sealed:
    """Weights that may not be read as long as they are sealed."""

    def __init__(self, view: FxView) -> None:
        self.closed = True
        self.weights = {name: self._sealed(weight) for name, weight in view.weights().items()}

    def _sealed(self, weight: Weight) -> Weight:
        def read() -> torch.Tensor:
            assert not self.closed, "a weight was read while the graph was exported"
            return weight.read()

        return ComputedWeight(read, weight.shape, weight.dtype, ("sealed", weight.key))


def test_no_weight_is_read_renamed_or_merged_and_exports_are_the_same_bytes(
    view: FxView, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """They are silent, and name no folder of this machine."""
    sealed, models = Sealed(view), []
    for weights in (sealed.weights, view.weights()):
        # The libraries behind the exporter warn of their own when they are first used.
        capfd.readouterr()
        recwarn.clear()
        models.append(
            to_onnx(view.to_program(), weights, ("ids", "mask"), ("states", "kept"), view.symbols)
        )
    initializers = models[0].graph.initializers
    assert {name for name in sealed.weights if name not in initializers} == set()
    assert "out.bias" in initializers and "norm.bias" in initializers
    for name, weight in sealed.weights.items():
        tensor = initializers[name].const_value
        assert isinstance(tensor, WeightTensor) and tensor.raw is weight
    transposed = {n.inputs[0].name for n in models[0].graph if n.op_type == "Transpose"}
    assert {"qkv.weight", "out.weight"} <= transposed
    sealed.closed = False
    first, second = (
        onnx_ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        for model in models
    )
    assert first == second
    assert b"site-packages" not in first and __file__.encode() not in first
    captured = capfd.readouterr()
    # Files that tests before this one left open are told of when they are freed.
    ours = [str(w.message) for w in recwarn if w.category is not ResourceWarning]
    assert (captured.out, captured.err, ours) == ("", "", [])


def test_attention_as_in_torch_where_a_query_sees_nothing() -> None:
    inputs = attentions()
    expected = expected_attentions(inputs)
    program = torch.export.export(Attentions(), (), inputs).run_decompositions({})
    model = to_onnx(program, {}, [*inputs], [*expected])
    for optimize in (True, False):
        outputs = run(model, inputs, optimize=optimize)
        for kind, actual in outputs.items():
            torch.testing.assert_close(actual, expected[kind], rtol=TOLERANCE, atol=TOLERANCE)


def test_results_are_named_and_the_program_is_left_as_it_was() -> None:
    """A value that is given twice, an input that is a result, a reshape."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x.view(-1, 3) * 2
            return y, y, x

    program = torch.export.export(Twice(), (torch.ones(2, 6),)).run_decompositions({})
    before = [node.target for node in program.graph.nodes]
    model = to_onnx(program, {}, ["mul"], ["a", "b", "x"])
    assert [node.target for node in program.graph.nodes] == before
    x = torch.arange(12.0).reshape(2, 6)
    out = run(model, {"mul": x})
    assert list(out) == ["a", "b", "x"]
    assert torch.equal(out["a"], 2 * x.view(4, 3)) and torch.equal(out["b"], out["a"])
    assert torch.equal(out["x"], x)


def test_own_ops_become_nodes_of_our_domain() -> None:
    with torch.library._scoped_library("graphwright", "FRAGMENT") as library:
        library.define(
            "probe(Tensor x, Tensor codes, Tensor? zeros, Tensor? bias, *, int bits, bool fair, "
            "float eps, int[] dims) -> Tensor"
        )
        library.impl("probe", lambda x, *_, **__: x.clone(), "CompositeExplicitAutograd")

        class Own(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("codes", torch.ones(6, 5, dtype=torch.uint8))
                self.bias = torch.nn.Parameter(torch.zeros(6))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = torch.ops.graphwright.probe(
                    x, self.codes, None, self.bias, bits=3, fair=True, eps=0.5, dims=[1, 2]
                )
                return out

        model = exported(Own(), (torch.ones(2, 5),))
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("graphwright", "probe")
    assert [v and v.name for v in node.inputs] == ["in0", "codes", None, "bias"]
    values = {name: attr.value for name, attr in node.attributes.items()}
    assert values == {"bits": 3, "fair": 1, "eps": 0.5, "dims": (1, 2)}
    assert model.graph.opset_imports["graphwright"] == 1


def test_a_fake_parameter_needs_a_handle(view: FxView) -> None:
    weights = {n: w for n, w in view.weights().items() if n != "qkv.weight"}
    with pytest.raises(BadInput, match=r"qkv\.weight has no data"):
        to_onnx(view.to_program(), weights, ("ids", "mask"), ("states", "kept"))


def test_a_handle_of_another_shape_is_refused(view: FxView) -> None:
    weights = {**view.weights(), "out.bias": MemoryWeight(torch.zeros(25))}
    with pytest.raises(BadInput, match=r"out\.bias: the graph has \[24\]"):
        to_onnx(view.to_program(), weights, ("ids", "mask"), ("states", "kept"))


def test_every_dtype_of_a_weight_survives() -> None:
    module = SumOfDtypes()
    x = torch.ones(2, 3)
    model = exported(module, (x,))
    dtypes = [str(model.graph.initializers[f"b{i}"].dtype) for i in range(4)]
    assert dtypes == ["BFLOAT16", "FLOAT16", "UINT8", "BOOL"]
    assert torch.equal(run(model, {"in0": x})["out"], module(x))
