"""Damaged ONNX files and those that ask for more than there is: told with file, node and field."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, GraphwrightError
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.onnx import trips
from graphwright.ir.run.sweep import sweep
from onnx import TensorProto, helper

from .onnx_files import MATMUL, W, const, node, save, set_to, stored_outside

# --- more than there is ---------------------------------------------------------------------------


def test_a_result_larger_than_memory_is_refused(tmp_path: Path) -> None:
    tail = [node("ReduceSum", ["z"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"])]
    size = const("s", np.array([1 << 20, 1 << 20, 64]))
    for first, constants in (
        (node("ConstantOfShape", ["s"], ["z"]), [size]),
        (node("Expand", ["one", "s"], ["z"]), [size, const("one", np.float32(1))]),
        (node("Tile", ["one", "s"], ["z"]), [size, const("one", np.ones((1, 1, 1), np.float32))]),
    ):
        view = load_onnx(save(tmp_path / "m.onnx", [first, *tail], constants))
        canonicalize(view)
        with pytest.raises(BadInput, match=rf"{first.op_type}.* would take 281475.* GB"):
            sweep(view, {"x": torch.ones(1, 6)})


def turns(name: str, *held: onnx.NodeProto, condition: onnx.NodeProto | None = None) -> Any:
    """A body that doubles what it carries, after what it holds."""
    info = helper.make_tensor_value_info
    ends = [info(f"{name}i", TensorProto.INT64, []), info(f"{name}c", TensorProto.BOOL, [])]
    ends += [info(f"{name}v", TensorProto.FLOAT, None)]
    test = condition or node("Identity", [f"{name}c"], [f"{name}d"])
    turned = node("Add", [f"{name}v", f"{name}v"], [f"{name}w"])
    results = [info(f"{name}d", TensorProto.BOOL, []), info(f"{name}w", TensorProto.FLOAT, None)]
    return helper.make_graph([*held, test, turned], name, ends, results)


def endless(body: Any) -> onnx.NodeProto:
    return node("Loop", ["n", "t", "x"], ["y"], body=body)


INNER = node("Loop", ["m", "t", "x"], ["z"], body=turns("inner"))
COUNTED = node("Constant", [], ["k"], value_int=1 << 40)
LOOPS = {
    "alone": (endless(turns("b")), 1 << 62, "makes 4,611,686,018,427,387,904 trips, which nothing"),
    "nested": (
        endless(turns("b", INNER)), 1 << 11, r"\(Loop\) and what it holds makes 4,194,304 trips",
    ),
    "counted within": (
        endless(turns("b", COUNTED, node("Loop", ["k", "t", "x"], ["z"], body=turns("inner")))), 1,
        "makes 1,099,511,627,776 trips",
    ),
    "in a branch": (
        node("If", ["t"], ["y"], **{
            f"{branch}_branch": helper.make_graph(
                [endless(turns("b"))], branch, [],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            ) for branch in ("then", "else")
        }), 1 << 62, r"\(If\) and what it holds makes 4,611",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOPS)
def test_loops_without_an_end_are_refused(case: str, tmp_path: Path) -> None:
    loop, count, message = LOOPS[case]
    constants = [
        const("n", np.array(count)), const("m", np.array(1 << 11)), const("t", np.array(True)),
    ]  # fmt: skip
    view = load_onnx(save(tmp_path / "m.onnx", [loop], constants))
    with pytest.raises(BadInput, match=message):
        sweep(view, {"x": torch.ones(1, 6)})


def test_a_loop_that_never_comes_to_its_condition_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trips, "MOST_SECONDS", 0.2)
    always = node("GreaterOrEqual", ["bi", "zero"], ["bd"])
    constants = [
        const("n", np.array(1 << 62)), const("t", np.array(True)), const("zero", np.array(0)),
    ]  # fmt: skip
    loop = endless(turns("b", condition=always))
    view = load_onnx(save(tmp_path / "m.onnx", [loop], constants))
    with pytest.raises(BadInput, match=r"\(Loop\) had come to no end after 0.2 seconds"):
        sweep(view, {"x": torch.ones(1, 6)})


# --- damage ---------------------------------------------------------------------------------------


def _second(**fields: Any) -> Callable[[Any], None]:
    """The model's second node, replaced."""

    def edit(model: Any) -> None:
        fields.setdefault("outputs", ["y"])
        second = helper.make_node(fields.pop("op"), fields.pop("inputs", ["a"]), **fields)
        model.graph.node[1].CopyFrom(second)

    return edit


DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "two of one name": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "names the initializer 'w' twice",
    ),
    "a dtype that is none": (set_to("graph.initializer.0.data_type", 99), "'w' is of the dtype 99"),
    "another dtype than the bytes": (
        set_to("graph.initializer.0.data_type", TensorProto.BOOL),
        r"'w' holds 96 bytes, and BOOL \[6, 4\] takes 24",
    ),
    "a size of less than 0": (set_to("graph.initializer.0.dims.1", -4), "has a dimension of less"),
    "a cycle": (set_to("graph.node.0.input.0", "y"), r"wait for each other: .*mm \(MatMul\) -> "),
    "nothing makes it": (set_to("graph.node.0.input.0", "z"), "reads 'z', which nothing makes"),
    "no output": (set_to("graph.output.0.name", "z"), "nothing makes the output 'z'"),
    "made twice": (
        lambda m: m.graph.node.append(m.graph.node[1]), r"end \(Relu\) makes 'y', which is made",
    ),
    "no inputs": (
        lambda m: m.graph.node[0].ClearField("input"), r"\(MatMul\) has 0 inputs, and .* takes 2",
    ),
    "too many inputs": (_second(op="Relu", inputs=["a", "a"]), "has 2 inputs, and the op takes 1"),
    "an input left out": (_second(op="Add", inputs=["", "a"]), "leaves its input A out"),
    "no attribute": (_second(op="Cast"), "Cast .* lacks the attribute 'to'"),
    "text for a number": (_second(op="Softmax", axis="one"), "its attribute axis is text, not"),
    "a foreign attribute": (_second(op="Relu", alpha=1.0), "has an attribute 'alpha'"),
    "a foreign op of ours": (
        _second(op="SparseLinear", domain="graphwright"), "did you mean sparse_linear?",
    ),
    "an offset with blanks": (
        stored_outside(offset=" 12 "), "offset of its external data is ' 12 '",
    ),
    "an offset before the file": (
        stored_outside(offset="-1"), "offset of its external data is '-1'",
    ),
    "no place": (stored_outside(location="w\0"), "names no file for its external data"),
    "a far opset": (set_to("opset_import.0.version", 1 << 40), "opset of ai.onnx is 1099511627776"),
    "an opset of 0": (set_to("opset_import.0.version", 0), "the opset of ai.onnx is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_with_file_node_and_field(name: str, tmp_path: Path) -> None:
    edit, words = DAMAGE[name]
    nodes = [node("MatMul", ["x", "w"], ["a"], name="mm"), node("Relu", ["a"], ["y"], name="end")]
    path = save(tmp_path / "m.onnx", nodes, [W], edit=edit)
    with pytest.raises(GraphwrightError, match=words) as caught:
        load_onnx(path)
    assert caught.value.exit_code == 2 and str(path) in str(caught.value)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"], name="relu")])
    path.write_bytes(path.read_bytes().replace(b"relu", b"r\xd1\xffu"))
    with pytest.raises(BadInput, match=r"the name b'r.*' is not text"):
        load_onnx(path)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(BadInput, match="a pipe or a device"):
        load_onnx(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "w.data")
    path = save(tmp_path / "n.onnx", [MATMUL], [W], edit=stored_outside())
    with pytest.raises(BadInput, match=r"w\.data is not a file, but a folder, a pipe or a device"):
        load_onnx(path)
