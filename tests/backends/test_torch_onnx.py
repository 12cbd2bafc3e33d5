"""Whole programs by torch's exporter: numbers, names, and no weight touched on the way."""

from __future__ import annotations

import gc
import itertools
import warnings
from typing import Any

import onnx_ir
import pytest
import torch
from graphwright.backends.torch_onnx import to_onnx
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.tensors import WeightTensor
from graphwright.ir.core.weights import ComputedWeight, MemoryWeight, Weight
from graphwright.ir.fx.view import FxView

from .held_to_torch import ATTENTIONS, TOLERANCE, attention, run


def exported(module: torch.nn.Module, args: tuple[Any, ...], **more: Any) -> onnx_ir.Model:
    program = torch.export.export(module.eval(), args, **more).run_decompositions({})
    tensors = {**program.state_dict, **program.constants}
    names = [f"in{i}" for i in range(len(program.graph_signature.user_inputs))]
    return to_onnx(program, {n: MemoryWeight(t) for n, t in tensors.items()}, names, ["out"])


def refusing(weight: Weight) -> Weight:
    def read() -> torch.Tensor:
        raise AssertionError("a weight was read while the graph was exported")

    return ComputedWeight(read, weight.shape, weight.dtype, ("refusing", weight.key))


def test_no_weight_is_read_renamed_or_merged(view: FxView) -> None:
    program = view.to_program()
    sealed = {name: refusing(weight) for name, weight in view.weights().items()}
    model = to_onnx(program, sealed, ("ids", "mask"), ("states", "kept"), view.symbols)
    initializers = model.graph.initializers
    assert {name for name in sealed if name not in initializers} == set()
    assert "out.bias" in initializers and "norm.bias" in initializers
    for name, weight in sealed.items():
        tensor = initializers[name].const_value
        assert isinstance(tensor, WeightTensor) and tensor.raw is weight
    transposed = {n.inputs[0].name for n in model.graph if n.op_type == "Transpose"}
    assert {"qkv.weight", "out.weight"} <= transposed


@ATTENTIONS
def test_attention_as_in_torch_where_a_query_sees_nothing(kind: str, grouped: bool) -> None:
    module, args = attention(kind, grouped)
    model = exported(module, args)
    expected = module(*args)
    if "bool" in kind:
        assert torch.equal(expected[0], torch.zeros(4, 5, 8))
    for optimize in (True, False):
        inputs = {f"in{i}": t for i, t in enumerate(args)}
        actual = run(model, inputs, optimize=optimize)["out"]
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_outputs_that_are_the_same_value_or_an_input() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 2
            return y, y, x

    program = torch.export.export(Twice(), (torch.ones(3),)).run_decompositions({})
    model = to_onnx(program, {}, ["mul"], ["a", "b", "x"])
    out = run(model, {"mul": torch.tensor([1.0, 2.0, 3.0])})
    assert list(out) == ["a", "b", "x"]
    assert out["a"].tolist() == out["b"].tolist() == [2.0, 4.0, 6.0]
    assert out["x"].tolist() == [1.0, 2.0, 3.0]


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


def test_an_op_without_onnx_form_is_named_with_its_module() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigh(x)[0]

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(x)
            return out

    with pytest.raises(BadInput, match=r"_linalg_eigh has no ONNX form .*module head of class"):
        exported(Outer(), (torch.eye(3),))


def test_a_fake_parameter_needs_a_handle(view: FxView) -> None:
    weights = {n: w for n, w in view.weights().items() if n != "qkv.weight"}
    with pytest.raises(BadInput, match=r"qkv\.weight has no data"):
        to_onnx(view.to_program(), weights, ("ids", "mask"), ("states", "kept"))


def test_a_handle_of_another_shape_is_refused(view: FxView) -> None:
    weights = {**view.weights(), "out.bias": MemoryWeight(torch.zeros(25))}
    with pytest.raises(BadInput, match=r"out\.bias: the graph has \[24\]"):
        to_onnx(view.to_program(), weights, ("ids", "mask"), ("states", "kept"))


def test_exports_are_byte_identical_silent_and_name_no_folder(
    view: FxView, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = view.weights(), ("ids", "mask"), ("states", "kept")
    models = (to_onnx(view.to_program(), *arguments) for _ in range(2))
    gc.collect()  # what tests before this one left open is told of when it is freed
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        first, second = (
            onnx_ir.serde.serialize_model(model).SerializeToString(deterministic=True)
            for model in models
        )
    assert first == second
    assert b"site-packages" not in first and __file__.encode() not in first
    captured = capfd.readouterr()
    ours = [str(w.message) for w in warned if w.category is not ResourceWarning]
    assert (captured.out, captured.err, ours) == ("", "", [])


def test_the_program_is_left_as_it_was() -> None:
    class View(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1, 3) + 1

    program = torch.export.export(View(), (torch.ones(2, 6),)).run_decompositions({})
    before = [node.target for node in program.graph.nodes]
    model = to_onnx(program, {}, ["x"], ["y"])
    assert [node.target for node in program.graph.nodes] == before
    assert run(model, {"x": torch.zeros(2, 6)})["y"].shape == (4, 3)


def test_every_dtype_of_a_weight_survives() -> None:
    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            numbers = torch.tensor([[1.5, -2.0, 0.0], [3.0, 0.25, -7.0]])
            for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.uint8, torch.bool)):
                self.register_buffer(f"b{i}", numbers.abs().to(dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [b.to(torch.float32) for b in self.buffers()]
            return x + sum(itertools.islice(parts, 1, None), parts[0])

    module = Sum()
    x = torch.ones(2, 3)
    model = exported(module, (x,))
    dtypes = [str(model.graph.initializers[f"b{i}"].dtype) for i in range(4)]
    assert dtypes == ["BFLOAT16", "FLOAT16", "UINT8", "BOOL"]
    assert torch.equal(run(model, {"in0": x})["out"], module(x))
