"""Native nodes: run in ONNX Runtime, typed by it, opaque values passed on, noise refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from graphwright.backends import compile as compile_model
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.types import Type
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.onnx import native
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
X = torch.linspace(-2, 3, 24).reshape(3, 8)
rng = np.random.default_rng(0)
W = rng.standard_normal((8, 4)).astype(np.float32)


def model(
    nodes: Sequence[Any], *, stored: dict[str, Any] | None = None, output: Any = None,
    shape: Sequence[Any] = ("rows", 8),
) -> onnx.ModelProto:  # fmt: skip
    """A model of ``x`` f32 [rows, 8] and an output ``y``."""
    tensors = [onnx.numpy_helper.from_array(v, n) for n, v in (stored or {}).items()]
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    y = output or helper.make_tensor_value_info("y", FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    domains = {"": 18, "com.microsoft": 1, "ai.onnx.ml": 3}
    opsets = [helper.make_opsetid(d, v) for d, v in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def loaded(proto: onnx.ModelProto, folder: Path) -> OnnxView:
    onnx.save(proto, folder / "m.onnx")
    return load_onnx(folder / "m.onnx")


def by_runtime(proto: onnx.ModelProto, x: torch.Tensor = X) -> Any:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"x": x.numpy()})[0]


N = helper.make_node
QUANTIZED = {
    "a": np.float32(0.02), "z": np.uint8(100), "q": rng.integers(0, 255, (8, 4), np.uint8),
    "b": np.float32(0.01), "c": np.float32(0.05),
}  # fmt: skip
CASES = {
    "SkipLayerNormalization": model(
        [N("SkipLayerNormalization", ["x", "x", "g"], ["y"], domain="com.microsoft")],
        stored={"g": W[:, 0]}, shape=("rows", 2, 8),
    ),
    "QLinearMatMul": model(
        [
            N("QuantizeLinear", ["x", "a", "z"], ["u"]),
            N("QLinearMatMul", ["u", "a", "z", "q", "b", "z", "c", "z"], ["v"]),
            N("DequantizeLinear", ["v", "c", "z"], ["y"]),
        ],
        stored=QUANTIZED,
    ),
    "DynamicQuantizeLinear": model(
        [
            N("DynamicQuantizeLinear", ["x"], ["u", "s", "zero"]),
            N("MatMulInteger", ["u", "q", "zero", "z"], ["i"]),
            N("Cast", ["i"], ["f"], to=FLOAT),
            N("Mul", ["f", "s"], ["y"]),
        ],
        stored=QUANTIZED,
    ),
    "DynamicQuantizeLSTM": model(
        [
            N("Mul", ["x", "rows"], ["t"]),
            N("DynamicQuantizeLSTM", ["t", "w", "r", "", "", "", "", "", "s", "z", "s", "z"],
              ["y"], domain="com.microsoft", hidden_size=8),
        ],
        stored={
            "rows": np.array([[1], [7]], np.float32), "s": np.full(1, 0.03, np.float32),
            "w": rng.integers(-99, 99, (1, 8, 32), np.int8), "z": np.zeros(1, np.int8),
            "r": rng.integers(-99, 99, (1, 8, 32), np.int8),
        },
        shape=("rows", 2, 8),
    ),
    "GlobalMaxPool": model(
        [N("Unsqueeze", ["x", "o"], ["u"]), N("GlobalMaxPool", ["u"], ["y"])],
        stored={"o": np.array([1])},
    ),
    "Normalizer": model([N("Normalizer", ["x"], ["y"], domain="ai.onnx.ml", norm="L2")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_native_nodes_are_those_of_the_runtime(name: str, tmp_path: Path) -> None:
    proto = CASES[name]
    rank = len(proto.graph.input[0].type.tensor_type.shape.dim)
    x = X if rank == 2 else X.reshape(3, 1, 8).expand(3, 2, 8).contiguous()
    actual = sweep(loaded(proto, tmp_path), {"x": x})["y"]
    assert torch.equal(actual, torch.from_numpy(by_runtime(proto, x)))


def test_the_runtime_types_what_onnx_does_not_know(tmp_path: Path) -> None:
    nodes = [
        N("SkipLayerNormalization", ["x", "x", "g"], ["n"], domain="com.microsoft"),
        N("MatMul", ["n", "w"], ["m"]),
        N("Relu", ["m"], ["y"]),
    ]
    proto = model(nodes, stored={"g": W[:, 0], "w": W}, shape=("rows", "seq", 8))
    view = loaded(proto, tmp_path)
    types = {view.name(v): view.type(v) for node in view.nodes() for v in view.results(node)}
    assert types["n"] == Type(torch.float32, ("rows", "seq", 8))
    assert types["m"] == Type(torch.float32, ("rows", "seq", 4))
    assert not view.infer_types()


def sequence(elem: Any) -> onnx.ValueInfoProto:
    return helper.make_value_info("y", helper.make_sequence_type_proto(elem))


TENSOR = helper.make_tensor_type_proto(FLOAT, None)
NAMES = np.array(["cat", "dog", "owl", "fox"], dtype=object)
OPAQUE = {
    "a sequence": model(
        [N("MatMul", ["x", "w"], ["m"]), N("SequenceConstruct", ["m", "x"], ["y"])],
        stored={"w": W}, output=sequence(TENSOR),
    ),
    "a sequence of maps": model(
        [
            N("MatMul", ["x", "w"], ["m"]),
            N("ZipMap", ["m"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[3, 1, 2, 5]),
        ],
        stored={"w": W},
        output=sequence(helper.make_map_type_proto(TensorProto.INT64, TENSOR)),
    ),
    "strings": model(
        [
            N("MatMul", ["x", "w"], ["m"]), N("ArgMax", ["m"], ["i"], axis=1, keepdims=0),
            N("Gather", ["names", "i"], ["y"]),
        ],
        stored={"w": W, "names": NAMES},
        output=helper.make_tensor_value_info("y", TensorProto.STRING, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_values_pass_through(name: str, tmp_path: Path) -> None:
    """As outputs they are compared by numbers, the same in the interpreter and in the runtime."""
    proto = OPAQUE[name]
    view = loaded(proto, tmp_path)
    values: list[Any] = []
    numbers = sweep(view, {"x": X}, observe=lambda node, _, results: values.append(results[0]))
    right = by_runtime(proto)
    if name == "strings":
        assert values[-1].tolist() == right.tolist()
    else:
        for one, other in zip(values[-1], right, strict=True):
            np.testing.assert_allclose(
                list(one.values()) if isinstance(one, dict) else one,
                list(other.values()) if isinstance(other, dict) else other, rtol=1e-6,
            )  # fmt: skip
    executable = compile_model(view, backend="onnxruntime")
    torch.testing.assert_close(executable(x=X)["y"], numbers["y"], rtol=1e-6, atol=1e-6)
    other = executable(x=-X)["y"]
    assert other.shape != numbers["y"].shape or not torch.allclose(other, numbers["y"])


NOISE = {
    "RandomNormalLike": [N("RandomNormalLike", ["x"], ["n"]), N("Add", ["x", "n"], ["y"])],
    "Bernoulli": [N("Sigmoid", ["x"], ["p"]), N("Bernoulli", ["p"], ["y"])],
    "Dropout": [N("Dropout", ["x", "r", "t"], ["y"])],
    "If": [
        N("ReduceMax", ["x"], ["m"], keepdims=0),
        N("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        N(
            "If", ["c"], ["y"],
            **{
                f"{branch}_branch": helper.make_graph(
                    [N("RandomUniformLike", ["x"], ["n"])], branch, [],
                    [helper.make_tensor_value_info("n", FLOAT, None)],
                )
                for branch in ("then", "else")
            },
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_refused_in_words(name: str, tmp_path: Path) -> None:
    stored = {"r": np.float32(0.5), "t": np.bool_(True)}
    view = loaded(model(NOISE[name], stored=stored), tmp_path)
    with pytest.raises(BadInput, match="other numbers at each run, so nothing"):
        sweep(view, {"x": X})


def test_dropout_in_training_mode_that_drops_nothing(tmp_path: Path) -> None:
    stored = {"r": np.float32(0.0), "t": np.bool_(True)}
    view = loaded(model(NOISE["Dropout"], stored=stored), tmp_path)
    assert torch.equal(sweep(view, {"x": X})["y"], X)


def test_a_node_without_a_kernel_is_refused_in_words(tmp_path: Path) -> None:
    nodes = [N("Conjure", ["x"], ["y"], name="rabbit", domain="com.microsoft")]
    view = loaded(model(nodes), tmp_path)
    with pytest.raises(BadInput, match=r"rabbit \(com.microsoft::Conjure\) does not run here"):
        sweep(view, {"x": X})


def test_what_a_kernel_does_not_take_is_not_computed_otherwise(tmp_path: Path) -> None:
    """onnx's evaluator takes a state of one row for two of them; ONNX Runtime does not."""
    nodes = [
        N("Unsqueeze", ["x", "o"], ["u"]),
        N("GRU", ["u", "v", "r", "", "", "h"], ["y"], name="gru", hidden_size=2),
    ]
    stored = {
        "o": np.array([0]), "h": np.zeros((1, 1, 2), np.float32),
        "v": np.ones((1, 6, 8), np.float32), "r": np.ones((1, 6, 2), np.float32),
    }  # fmt: skip
    view = loaded(model(nodes, stored=stored), tmp_path)
    with pytest.raises(BadInput, match=r"gru \(ai.onnx::GRU\) does not take .*must have shape"):
        sweep(view, {"x": X})
    assert sweep(view, {"x": X[:1]})["y"].shape == (1, 1, 1, 2)


def test_dimensions_that_are_called_unknown_may_differ(tmp_path: Path) -> None:
    proto = model([N("Softplus", ["x"], ["y"])], shape=("?", "?"))
    executable = compile_model(loaded(proto, tmp_path), backend="onnxruntime")
    assert executable(x=X)["y"].shape == X.shape


def test_wide_unsigned_integers(tmp_path: Path) -> None:
    """Of which torch has no arithmetic."""
    nodes = [
        N("Cast", ["x"], ["u"], to=TensorProto.UINT32),
        N("Add", ["u", "u"], ["s"]),
        N("Cast", ["s"], ["y"], to=FLOAT),
    ]
    proto = model(nodes)
    actual = sweep(loaded(proto, tmp_path), {"x": X.abs()})["y"]
    assert torch.equal(actual, torch.from_numpy(by_runtime(proto, X.abs())))


def test_sessions_are_made_once_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Any] = []
    monkeypatch.setattr(native, "KEPT", 3)
    start = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: sessions.append(a) or start(*a, **k)
    )
    names = ["x", "a", "b", "c", "y"]
    nodes = [N("Softplus", [i], [o]) for i, o in itertools.pairwise(names)]
    few = loaded(model(nodes), tmp_path)
    sweep(few, {"x": X})
    assert len(sessions) == 4
    sweep(few, {"x": X})
    assert len(sessions) == 8  # four in turn do not fit into three places
    monkeypatch.setattr(native, "KEPT", 4)
    sweep(few, {"x": X})
    before = len(sessions)
    sweep(few, {"x": X})
    assert len(sessions) == before


@pytest.mark.parametrize("inside", [False, True])
def test_what_would_end_the_process_is_refused(inside: bool, tmp_path: Path) -> None:
    """ONNX Runtime 1.31 crashes on this node, as it is and in a graph inside another."""
    node = N("Attention", ["x", "w"], ["y"], "fused", domain="com.microsoft", num_heads=2)
    weights = {"w": rng.standard_normal((8, 24)).astype(np.float32), "yes": np.bool_(True)}
    if inside:
        body = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("y", FLOAT, None)])
        node = N("If", ["yes"], ["y"], "if", then_branch=body, else_branch=body)
    proto = model([node], stored=weights, shape=("rows", 3, 8))
    reason = r"fused .*Attention\) has no bias, at which ONNX Runtime's kernel ends the process"
    with pytest.raises(BadInput, match=f"m.onnx: the node .*{reason}"):
        loaded(proto, tmp_path)
    view = OnnxView(onnx_ir.serde.deserialize_model(proto))
    with pytest.raises(BadInput, match=reason):
        sweep(view, {"x": torch.ones(2, 3, 8)})
