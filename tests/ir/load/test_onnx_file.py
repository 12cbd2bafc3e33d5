"""ONNX files as people have them: what runtimes take is read, and the rest is told apart.

What is right is what ONNX Runtime computes, with its optimisation off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, NodeFailed
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.vocab import spec
from onnx import TensorProto, helper, numpy_helper
from onnxscript import version_converter

from .onnx_files import (
    MATMUL,
    W,
    check,
    const,
    node,
    random_numbers,
    runtime,
    save,
    set_to,
    stored_outside,
)

# --- what runtimes take --------------------------------------------------------------------------


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [node("Relu", ["t"], ["y"]), node("MatMul", ["x", "w"], ["t"])]
    view = check(save(tmp_path / "m.onnx", nodes, [W]), x=random_numbers(3, 6))
    assert [view.op(n) for n in view.nodes()] == ["matmul", "relu"]


@pytest.mark.parametrize(("word", "more", "op", "size"), [
    ("SAME_UPPER", {}, "conv", 3), ("SAME_LOWER", {}, "conv", 3),
    ("VALID", {"strides": [2, 2]}, "conv", 3), ("SAME_UPPER", {}, "native", 2),
    ("SAME_LOWER", {"strides": [2, 2]}, "native", 3),
])  # fmt: skip
def test_a_convolution_padded_by_a_word(
    word: str, more: dict[str, Any], op: str, size: int, tmp_path: Path
) -> None:
    """It is read as one unless the two ends get zeros of different number, or that is not known."""
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad=word, **more)]
    weight = const("w", random_numbers(4, 3, size, size))
    path = save(tmp_path / "m.onnx", nodes, [weight], x=("b", 3, "h", "w"))
    view = check(path, x=random_numbers(2, 3, 9, 8))
    assert [view.op(n) for n in view.nodes()] == [op]


@pytest.mark.parametrize("opset", [11, 14, 16, 17])
def test_the_runtimes_layer_norm_in_opsets_that_have_none(opset: int, tmp_path: Path) -> None:
    """As ``onnxruntime.transformers.optimizer`` writes it."""
    nodes = [
        node("LayerNormalization", ["x", "s"], ["n"], axis=-1), node("MatMul", ["n", "w"], ["y"])
    ]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, [W, const("s", random_numbers(6))], opset=opset)
    view = check(path, x=random_numbers(3, 6))
    assert [view.op(n) for n in view.nodes()] == ["layer_norm", "matmul"]


def test_an_old_file_is_converted_where_an_op_has_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax joined all dimensions from its axis on until opset 13; MatMul and Relu are old."""
    converted = []
    whole = version_converter.convert_version

    def convert(model: Any, **how: Any) -> Any:
        converted.append(model)
        return whole(model, **how)

    monkeypatch.setattr(version_converter, "convert_version", convert)
    nodes = [node("Relu", ["x"], ["t"]), node("MatMul", ["t", "w"], ["y"])]
    check(save(tmp_path / "same.onnx", nodes, [W], opset=14), x=random_numbers(3, 6))
    assert not converted
    flat = [node("Softmax", ["x"], ["t"], axis=1), node("MatMul", ["t", "w"], ["y"])]
    path = save(tmp_path / "other.onnx", flat, [W], opset=12, x=("b", "s", 6))
    check(path, x=random_numbers(3, 2, 6))
    assert converted


def test_a_default_that_a_caller_may_override_is_no_constant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4])
    path = save(tmp_path / "m.onnx", [MATMUL], [W], inputs=[w])
    with caplog.at_level(logging.WARNING):
        view = check(path, x=random_numbers(3, 6))
    assert "1 weights are inputs too (w), whose numbers a caller may give" in caplog.text
    assert view.input_names() == ("x",) and not view.weights()
    read = view.operands(next(iter(view.nodes())))[1]
    assert view.weight(read) is None


def test_before_version_4_of_the_format_all_weights_are_inputs(tmp_path: Path) -> None:
    w = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4])
    path = save(tmp_path / "m.onnx", [MATMUL], [W], inputs=[w], ir=3, opset=8)
    view = check(path, x=random_numbers(3, 6))
    assert list(view.weights()) == ["w"]


def test_the_standard_domain_has_two_names(tmp_path: Path) -> None:
    def edit(model: Any) -> None:
        model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"

    check(save(tmp_path / "m.onnx", [MATMUL], [W], edit=edit), x=random_numbers(3, 6))


def test_a_size_of_less_than_0_is_an_open_one(tmp_path: Path) -> None:
    view = check(save(tmp_path / "m.onnx", [MATMUL], [W], x=(-1, 6)), x=random_numbers(3, 6))
    assert str(view.type(view.inputs()[0])) == "f32[?, 6]"


# --- ops as ONNX has them -------------------------------------------------------------------------

RESHAPES = {
    "zeros keep sizes": ([0, 0, 3, 2], 0, "f32[b, s, 3, 2]"),
    "zeros and the rest": ([0, 0, 3, -1], 0, "f32[b, s, 3, 2]"),
    "a zero and an open rest": ([0, -1, 6], 0, "f32[b, s, 6]"),
    "one open zero": ([0, 4, 6], 0, "f32[b, 4, 6]"),
    "no zeros": ([-1, 6], 0, "f32[?, 6]"),
    "zeros that are allowed": ([2, 4, 6], 1, "f32[2, 4, 6]"),
}


@pytest.mark.parametrize("name", RESHAPES)
@pytest.mark.parametrize("computed", [False, True])
def test_reshape_with_zeros(name: str, computed: bool, tmp_path: Path) -> None:
    sizes, allowed, type_ = RESHAPES[name]
    nodes = [node("Reshape", ["x", "s"], ["y"], allowzero=allowed)]
    constants = [const("s", np.array(sizes))]
    if computed:
        nodes.insert(0, node("Sub", ["s0", "one"], ["s"]))
        constants = [const("s0", np.array(sizes) + 1), const("one", np.array(1))]
    path = save(tmp_path / "m.onnx", nodes, constants, x=("b", "s", 6))
    view = check(path, x=random_numbers(2, 4, 6))
    (types,) = {t for n in view.nodes() if view.op(n) == "reshape" for t in _inferred(view, n)}
    assert computed or types == type_


def _inferred(view: View, maker: Any) -> list[str]:
    op, operands, attrs = view.read(maker) or ("", (), {})
    types = [o if o is None or isinstance(o, int | float) else view.type(o) for o in operands]
    return [str(t) for t in spec(op).infer(types, attrs)]


def test_reshape_of_nothing(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "s"], ["y"], allowzero=1)]
    path = save(tmp_path / "m.onnx", nodes, [const("s", np.array([0, 3, 2]))], x=("b", 4, 6))
    check(path, x=random_numbers(0, 4, 6))


def test_clip_without_bounds_passes_on(tmp_path: Path) -> None:
    nodes = [node("Clip", ["x"], ["t"]), node("Clip", ["t", "", "high"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [const("high", np.float32(0.25))])
    view = check(path, x=random_numbers(3, 6))
    assert [view.op(n) for n in view.nodes()] == ["identity", "clamp"]


def test_squeeze_over_a_dimension_with_a_name(tmp_path: Path) -> None:
    nodes = [node("Squeeze", ["x", "axes"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [const("axes", np.array([1]))], x=("b", "one", 6))
    view = check(path, x=random_numbers(3, 1, 6))
    check_structure(view)
    with pytest.raises(NodeFailed, match=r"Squeeze .* a dimension of 2 is not 1"):
        sweep(view, {"x": torch.ones(3, 2, 6)})


def test_outputs_that_are_left_out(tmp_path: Path) -> None:
    norm = node("LayerNormalization", ["x", "w"], ["t", "", ""])
    lstm = node("LSTM", ["t", "v", "r"], ["", "y", ""], hidden_size=2)
    constants = [const("w", random_numbers(6)), const("v", random_numbers(1, 8, 6))]
    constants.append(const("r", random_numbers(1, 8, 2)))
    view = load_onnx(save(tmp_path / "m.onnx", [norm, lstm], constants, x=("s", "b", 6)))
    check_structure(view)
    assert [len(view.results(n)) for n in view.nodes()] == [1, 2]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Less", "Equal"])
def test_unsigned_integers_wrap_around(op: str, dtype: str, tmp_path: Path) -> None:
    top = np.iinfo(dtype).max
    constants = [const("a", np.array([3, top, 7, top], dtype))]
    constants.append(const("b", np.array([5, top - 1, 7, 1], dtype)))
    nodes = [node(op, ["a", "b"], ["y"]), node("Relu", ["x"], ["z"])]
    kind = TensorProto.BOOL if op in ("Less", "Equal") else constants[0].data_type
    path = save(
        tmp_path / "m.onnx", nodes, constants, outputs=("y", "z"),
        edit=set_to("graph.output.0.type.tensor_type.elem_type", kind),
    )  # fmt: skip
    check(path, x=random_numbers(1, 6))


# --- functions -----------------------------------------------------------------------------------


def function(name: str, *calls: str) -> Any:
    """``name(p) -> q``: calls one behind another, or ``Relu``."""
    names = ["p", *(f"t{i}" for i in range(len(calls) - 1)), "q"]
    nodes = [
        node(call, [names[i]], [names[i + 1]], domain="loc" if call != "Relu" else "")
        for i, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("loc", 1)]
    return helper.make_function("loc", name, ["p"], ["q"], nodes, opsets)


def test_functions_are_written_out(tmp_path: Path) -> None:
    functions = [function("F", "Relu"), function("G", "F", "F")]
    nodes = [node("MatMul", ["x", "w"], ["t"]), node("G", ["t"], ["y"], domain="loc")]
    path = save(tmp_path / "m.onnx", nodes, [W], functions=functions, domains=["loc"])
    view = check(path, x=random_numbers(3, 6))
    assert [view.op(n) for n in view.nodes()] == ["matmul", "relu", "relu"]


def test_functions_that_grow_without_bound_are_refused(tmp_path: Path) -> None:
    functions = [function("F0", "Relu")]
    functions += [function(f"F{i}", f"F{i - 1}", f"F{i - 1}") for i in range(1, 31)]
    call = node("F30", ["x"], ["y"], domain="loc")
    path = save(tmp_path / "m.onnx", [call], functions=functions, domains=["loc"])
    with pytest.raises(BadInput, match="written out, are 3,221,225,471 nodes; up to 262,144"):
        load_onnx(path)


def test_functions_in_a_circle_are_refused(tmp_path: Path) -> None:
    functions = [function("F", "G"), function("G", "F")]
    call = node("F", ["x"], ["y"], domain="loc")
    path = save(tmp_path / "m.onnx", [call], functions=functions, domains=["loc"])
    with pytest.raises(BadInput, match=r"call each other: (F -> G -> F|G -> F -> G)"):
        load_onnx(path)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "INT2", "UINT2"])
@pytest.mark.parametrize("external", [False, True])
def test_narrow_integers_have_their_sign(dtype: str, external: bool, tmp_path: Path) -> None:
    kind = getattr(TensorProto, dtype)
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT2": (-2, 2), "UINT2": (0, 4)}[dtype]
    numbers = np.resize(np.arange(low, high), 33)
    codes = helper.make_tensor("c", kind, [3, 11], numbers.tolist())
    packed = numpy_helper.to_array(codes)
    if external:
        raw = onnx_ir.Tensor(packed, dtype=onnx_ir.DataType(kind)).tobytes()
        (tmp_path / "w.data").write_bytes(b"..." + raw)
        codes.ClearField("int32_data")
        codes.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.data"), ("offset", "3"), ("length", str(len(raw)))):
            codes.external_data.add(key=key, value=value)
    nodes = [node("DequantizeLinear", ["c", "s"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    scale = const("s", np.float32(0.5))
    path = save(
        tmp_path / "m.onnx", nodes, [codes, scale], opset=25 if "2" in dtype else 21, ir=13,
        x=("b", 3),
    )  # fmt: skip
    weight = load_onnx(path).weights()["c"]
    assert torch.equal(weight.read().long(), torch.from_numpy(numbers).reshape(3, 11))
    check(path, x=random_numbers(2, 3))


DEQUANTIZED = {
    "a scale a column": ("int8", (96,), {"axis": 1}, (13, 17, 18, 19, 21)),
    "a scale a row": ("uint8", (400,), {"axis": 0}, (13,)),
    "one scale": ("uint8", (), {}, (13,)),
    "blocks": ("int8", (13, 96), {"axis": 0, "block_size": 32}, (21,)),
}


@pytest.mark.parametrize("name", DEQUANTIZED)
@pytest.mark.parametrize("zeros", [False, True])
def test_stored_weights_are_linears(name: str, zeros: bool, tmp_path: Path) -> None:
    """Larger than what is folded, so that the numbers are those of the rule."""
    dtype, shape, attrs, opsets = DEQUANTIZED[name]
    rng = np.random.default_rng(0)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    constants = [const("w_quantized", rng.integers(low, high, (400, 96)).astype(dtype))]
    constants.append(const("s", rng.random(shape).astype(np.float32) * 0.01))
    constants += [const("z", rng.integers(low, high, shape).astype(dtype))] if zeros else []
    inputs = [c.name for c in constants]
    nodes = [node("DequantizeLinear", inputs, ["w"], **attrs), node("MatMul", ["x", "w"], ["y"])]
    for opset in opsets:
        path = save(tmp_path / "m.onnx", nodes, constants, x=("b", 400), opset=opset, ir=10)
        view = load_onnx(path)
        canonicalize(view)
        (linear,) = view.nodes()
        assert view.op(linear) == "linear"
        x = random_numbers(3, 400)
        (mine,) = sweep(view, {"x": torch.from_numpy(x)}).values()
        np.testing.assert_allclose(mine.numpy(), runtime(path, x=x)[0], rtol=1e-4, atol=1e-4)


def test_a_table_stays_stored(tmp_path: Path) -> None:
    constants = [const("t", np.ones((400, 96), np.int8)), const("s", np.float32(0.5))]
    constants.append(const("i", np.arange(6)))
    nodes = [
        node("DequantizeLinear", ["t", "s"], ["w"]), node("Gather", ["w", "i"], ["r"]),
        node("MatMul", ["x", "r"], ["y"]),
    ]  # fmt: skip
    view = load_onnx(save(tmp_path / "m.onnx", nodes, constants))
    canonicalize(view)
    assert "DequantizeLinear" in {view.native_op(n) for n in view.nodes()}


def hub_cache(tmp_path: Path, target: str) -> Path:
    """``snapshots/rev/onnx/m.onnx``, a link, with its weights behind another one."""
    store = tmp_path / "models--a--b"
    folder = store / "snapshots" / "rev" / "onnx"
    folder.mkdir(parents=True)
    (store / "blobs").mkdir()
    (tmp_path / "elsewhere").write_bytes(bytes(96))
    (store / "blobs" / "222").write_bytes(numpy_helper.to_array(W).tobytes())
    save(store / "blobs" / "111", [MATMUL], [W], edit=stored_outside())
    (folder / "m.onnx").symlink_to("../../../blobs/111")
    (folder / "w.data").symlink_to(target)
    return folder / "m.onnx"


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    check(hub_cache(tmp_path, "../../../blobs/222"), x=random_numbers(3, 6))


def test_links_out_of_the_hub_cache_are_not_followed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'w\.data' lies outside the model's folder"):
        load_onnx(hub_cache(tmp_path, "../../../../elsewhere"))


def test_weights_may_share_their_bytes_and_not_a_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(numpy_helper.to_array(W).tobytes() * 2)
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "v"], ["b"])]
    nodes.append(node("Add", ["a", "b"], ["y"]))

    def shared(offset: str) -> Callable[[Any], None]:
        def edit(model: Any) -> None:
            stored_outside()(model)
            model.graph.initializer.append(model.graph.initializer[0])
            model.graph.initializer[1].name = "v"
            model.graph.initializer[1].external_data.add(key="offset", value=offset)

        return edit

    for offset in ("0", "96"):
        check(save(tmp_path / "m.onnx", nodes, [W], edit=shared(offset)), x=random_numbers(3, 6))
    with pytest.raises(BadInput, match=r"w\.data: the bytes of 'w' and 'v' overlap"):
        load_onnx(save(tmp_path / "m.onnx", nodes, [W], edit=shared("92")))


# --- types ----------------------------------------------------------------------------------------


def test_names_that_other_tools_made_up_are_inferred_anew(tmp_path: Path) -> None:
    nodes = [node("Identity", ["x"], ["t"]), node("Relu", ["t"], ["u"]), node("Neg", ["u"], ["y"])]

    def edit(model: Any) -> None:
        for name, dims in (("t", ["unk__26", 6]), ("u", ["2*b", 6])):
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
            model.graph.value_info.append(info)

    view = load_onnx(save(tmp_path / "m.onnx", nodes, edit=edit))
    types = [str(view.type(view.result(n))) for n in view.nodes()]
    assert types == ["f32[b, 6]", "f32[2*b, 6]", "f32[2*b, 6]"]


def test_dtypes_that_inference_leaves_out_are_those_of_the_schema(tmp_path: Path) -> None:
    nodes = [node("Normalizer", ["x"], ["n"], domain="ai.onnx.ml", norm="L2")]
    nodes += [node("MatMul", ["n", "w"], ["t"]), node("Relu", ["t"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [W], domains=["ai.onnx.ml"])
    view = check(path, x=random_numbers(3, 6))
    assert {view.type(view.result(n)).dtype for n in view.nodes()} == {torch.float32}


WRONG_TYPES: dict[str, tuple[Any, str]] = {
    "perm twice": (node("Transpose", ["x"], ["y"], perm=[0, 0]), "has not the dimensions of perm"),
    "another width": (node("MatMul", ["x", "v"], ["y"]), "inner dimensions 6 and 5 differ"),
    "no such axis": (node("Softmax", ["x"], ["y"], axis=7), "has no dimension 7"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_operands_that_do_not_fit_are_told_with_the_node(name: str, tmp_path: Path) -> None:
    wrong, words = WRONG_TYPES[name]
    path = save(tmp_path / "m.onnx", [wrong], [const("v", random_numbers(5, 3))])
    with pytest.raises(BadInput, match=rf"m\.onnx: the node {wrong.op_type} .*{words}"):
        load_onnx(path)


# --- graphs inside nodes --------------------------------------------------------------------------


def branch(name: str, op: str, *operands: str) -> Any:
    info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    first = node("Identity", [operands[0]], [f"{name}_const"])
    last = node(op, [f"{name}_const", *operands[1:]], [f"{name}_y"])
    return helper.make_graph([first, last], name, [], [info])


def test_what_graphs_inside_nodes_read_stays(tmp_path: Path) -> None:
    """A value, one that is repeated outside, and weights that nothing else reads."""
    nodes = [
        node("Relu", ["x"], ["r"]), node("Identity", ["r"], ["t"]), node("Relu", ["x"], ["s"]),
        node("ReduceSum", ["x"], ["n"], keepdims=0), node("Greater", ["n", "zero"], ["c"]),
        node("If", ["c"], ["z"], then_branch=branch("a", "MatMul", "t", "w"),
             else_branch=branch("b", "MatMul", "s", "v")),
        node("Mul", ["z", "half"], ["y"]),
    ]  # fmt: skip
    constants = [W, const("v", random_numbers(6, 4, seed=1)), const("zero", np.float32(0))]
    path = save(tmp_path / "m.onnx", nodes, [*constants, const("half", np.float32(0.5))])
    for sign in (1, -1):
        x = np.abs(random_numbers(3, 6)) * sign
        view = check(path, x=x)
        expected = runtime(path, x=x)[0]
        canonicalize(view)
        assert isinstance(view, OnnxView)
        added = view.add_weight("a_const", MemoryWeight(torch.ones(3)))
        assert view.name(added) != "a_const", "a graph inside hides a value of this name"
        onnx_ir.save(view.model, tmp_path / "n.onnx")
        actual = runtime(tmp_path / "n.onnx", x=x)[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        ours = sweep(view, {"x": torch.from_numpy(x)})["y"].numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
