"""``python -m graphwright.tools.bench.onnx_causes``: ONNX as it is written, a file of each kind.

Each file is one that tools write or people have, small and with random weights: shapes with 0,
rounded and fused ops, subgraphs, functions, omitted outputs, noise, sizes that are computed. Each
goes through ``optimize-model`` within ``hostile_worker``'s bounds; the artifact is then run in ONNX
Runtime beside the file. Prints the table of ``TRUTH.md``. Linux alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ...backends import compile as compile_model
from ...ir.run.verify import compare
from .hostile_worker import Ended, command

RECIPE = "quantize{bits=8 group=32 optional=true}"
CONTRIB, ML = "com.microsoft", "ai.onnx.ml"
WORDS = 110
"""Letters of an error that are shown."""
node = helper.make_node
_draw = np.random.default_rng(0)


def _random(*shape: int) -> Any:
    return (_draw.standard_normal(shape) * 0.1).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A file; ``weights`` are more than ``w [64, 96]``, ``shape`` is that of ``x`` and ``feeds``
    are what both are run on, where sizes are not to be drawn."""

    nodes: Sequence[Any]
    weights: dict[str, Any] = field(default_factory=dict)
    shape: Sequence[Any] = ("b", 64)
    feeds: dict[str, Any] = field(default_factory=lambda: {"x": _random(4, 64)})
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ("y",)
    opset: int = 18
    functions: Sequence[Any] = ()

    def model(self) -> onnx.ModelProto:
        stored = {"w": _random(64, 96), **self.weights}
        tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.shape))
        outputs = [
            helper.make_tensor_value_info(o, TensorProto.FLOAT, None) if isinstance(o, str) else o
            for o in self.outputs
        ]
        graph = helper.make_graph(
            self.nodes, "g", [x, *self.inputs] if "x" in self.feeds else [*self.inputs], outputs,
            tensors,
        )  # fmt: skip
        domains = {"": self.opset, CONTRIB: 1, ML: 3, "local": 1}
        opsets = [helper.make_opsetid(d, v) for d, v in domains.items()]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=9, functions=list(self.functions)
        )


def _value(name: str, kind: int = TensorProto.FLOAT, shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _body(nodes: list[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    return helper.make_graph(nodes, "body", list(inputs), list(outputs))


def _loop(step: Any, trips: int) -> Case:
    """``x`` goes through ``step``, from ``v`` to ``u``, so many times."""
    ends = [_value("i", TensorProto.INT64, []), _value("c", TensorProto.BOOL, []), _value("v")]
    body = _body([node("Identity", ["c"], ["d"]), step], ends,
                 [_value("d", TensorProto.BOOL, []), _value("u")])  # fmt: skip
    loop = node("Loop", ["trips", "true", "x"], ["t"], "loop", body=body)
    weights = {"trips": np.array(trips), "true": np.array(True), "s": _random(64, 64)}
    return Case([loop, node("ReduceSum", ["t"], ["r"], keepdims=0), _LINEAR, _SUM], weights)


_LINEAR = node("MatMul", ["x", "w"], ["h"])
_SUM = node("Add", ["h", "r"], ["y"])
_LAST = node("MatMul", ["t", "w"], ["y"])
_BIG = [node("ConstantOfShape", ["size"], ["z"], "big"),
        node("ReduceSum", ["z"], ["r"], keepdims=0), _LINEAR, _SUM]  # fmt: skip
_CODES = {
    "q": _draw.integers(-99, 99, (64, 96), np.int8), "qs": np.float32(0.003), "qz": np.int8(0),
    "xs": np.float32(0.01), "xz": np.uint8(128), "ys": np.float32(0.02),
}  # fmt: skip


def _branch(name: str, op: str) -> Any:
    inner = [node("MatMul", ["x", "w"], [f"{name}1"]), node(op, [f"{name}1"], [name])]
    return helper.make_graph(inner, name, [], [_value(name)])


def _chosen(then: Any, other: Any, *after: Any) -> list[Any]:
    return [
        node("ReduceMax", ["x"], ["most"], keepdims=0), node("Less", ["most", "far"], ["c"]),
        node("If", ["c"], ["t"], "choose", then_branch=then, else_branch=other), *after,
    ]  # fmt: skip


def cases() -> dict[str, Case]:
    """The files, by what they are; first the cause that brought them here."""
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    images = node("Conv", ["x", "k"], ["y"])
    scan = _body(
        [node("Add", ["a", "s"], ["b"]), node("MatMul", ["s", "u"], ["o"])],
        [_value("s", f32, [4, 64]), _value("a", f32, [4, 64])],
        [_value("b", f32, [4, 64]), _value("o", f32, [4, 64])],
    )  # fmt: skip
    local = helper.make_function(
        "local", "F", ["p", "m"], ["o"],
        [node("MatMul", ["p", "m"], ["i"]), node("Relu", ["i"], ["o"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    map_type = helper.make_map_type_proto(i64, helper.make_tensor_type_proto(f32, []))
    maps = helper.make_value_info("y", helper.make_sequence_type_proto(map_type))
    ids = _draw.integers(0, 50, (2, 5))
    text = {"input_ids": ids, "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(5)[None].repeat(2, 0)}  # fmt: skip
    huge = helper.make_graph([node("ConstantOfShape", ["size"], ["o"], "big")], "b", [],
                             [_value("o")])  # fmt: skip
    small = helper.make_graph([node("Neg", ["x"], ["o"])], "c", [], [_value("o")])
    far = {"far": np.float32(1e9)}
    return {
        "B1: 12 channels": Case(
            [images], {"k": _random(8, 12, 3, 3)}, "bchw", {"x": _random(1, 12, 16, 16)}
        ),
        "B1: audio shorter than a kernel": Case(
            [images], {"k": _random(4, 1, 400)}, ("b", 1, "n"), {"x": _random(1, 1, 800)}
        ),
        "B1: a dimension of -1": Case([_LINEAR, node("Relu", ["h"], ["y"])], shape=(-1, 64)),
        "B1: a state of one row, and a number": Case(
            [node("Add", ["x", "s"], ["u"]), node("Mul", ["u", "n"], ["t"]), _LAST],
            inputs=[_value("s", f32, [1, 64]), _value("n", f32, [])],
            feeds={"x": _random(4, 64), "s": _random(1, 64), "n": np.array(0.3, np.float32)},
        ),
        "B2: Reshape with 0": Case(
            [_LINEAR, node("Reshape", ["h", "to"], ["y"])], {"to": np.array([0, 12, 8])}
        ),
        "B2: allowzero": Case(
            [_LINEAR, node("Reshape", ["h", "to"], ["y"], allowzero=1)],
            {"to": np.array([-1, 12, 8])},
        ),
        "B4: QDQ, opset 13": Case(
            [node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
             node("DequantizeLinear", ["xq", "xs", "xz"], ["xr"]),
             node("DequantizeLinear", ["q", "qs", "qz"], ["m"]), node("MatMul", ["xr", "m"], "y")],
            _CODES, opset=13,
        ),
        "B4: QOperator": Case(
            [node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
             node("QLinearMatMul", ["xq", "xs", "xz", "q", "qs", "qz", "ys", "xz"], ["yq"]),
             node("DequantizeLinear", ["yq", "ys", "xz"], ["y"])], _CODES, opset=13,
        ),
        "B4: dynamic": Case(
            [node("DynamicQuantizeLinear", ["x"], ["xq", "s", "z"]),
             node("MatMulInteger", ["xq", "q", "z"], ["i"]), node("Cast", ["i"], ["f"], to=f32),
             node("Mul", ["s", "qs"], ["m"]), node("Mul", ["f", "m"], ["y"])], _CODES, opset=13,
        ),
        "B4: SkipLayerNormalization": Case(
            [node("SkipLayerNormalization", ["x", "x", "g", "o"], ["t"], domain=CONTRIB), _LAST],
            {"g": _random(64), "o": _random(64)}, ("b", "s", 64), {"x": _random(2, 3, 64)},
        ),
        "B4: FusedMatMul, BiasGelu": Case(
            [node("FusedMatMul", ["x", "w"], ["t"], domain=CONTRIB, alpha=0.5),
             node("BiasGelu", ["t", "o"], ["y"], domain=CONTRIB)], {"o": _random(96)},
        ),
        "B4: Attention": Case(
            [node("Attention", ["x", "m", "o"], ["t"], domain=CONTRIB, num_heads=4), _LAST],
            {"m": _random(64, 192), "o": _random(192)}, ("b", "s", 64), {"x": _random(2, 3, 64)},
        ),
        "B5: position_ids": Case(
            [node("Gather", ["e", "input_ids"], ["a"]), node("Gather", ["p", "position_ids"], "b"),
             node("Add", ["a", "b"], ["s"]), node("Cast", ["attention_mask"], ["f"], to=f32),
             node("Unsqueeze", ["f", "last"], ["g"]), node("Mul", ["s", "g"], ["t"]), _LAST],
            {"e": _random(50, 64), "p": _random(20, 64), "last": np.array([-1])}, feeds=text,
            inputs=[_value(name, i64, ["b", "s"]) for name in text],
        ),
        "B6: a weight of zeros": Case(
            [node("MatMul", ["x", "m"], ["t"]), _LINEAR, node("Relu", ["h"], ["y"])],
            {"m": np.zeros((64, 96), np.float32)}, outputs=("y", "t"),
        ),
        "B6: a product in float16": Case(
            [node("Cast", ["x"], ["i"], to=TensorProto.FLOAT16), node("MatMul", ["i", "m"], ["j"]),
             node("Cast", ["j"], ["y"], to=f32)], {"m": _random(64, 96).astype(np.float16)},
        ),
        "B7: If": Case(
            _chosen(_branch("p", "Tanh"), _branch("q", "Neg"), node("MatMul", ["t", "v"], ["y"])),
            {"v": _random(96, 32), **far},
        ),
        "B7: Loop": _loop(node("MatMul", ["v", "s"], ["u"]), 3),
        "B7: Scan": Case(
            [node("Unsqueeze", ["x", "first"], ["xs"]),
             node("Scan", ["x", "xs"], ["t", "all"], body=scan, num_scan_inputs=1), _LAST],
            {"u": _random(64, 64), "first": np.array([0])}, (4, 64),
        ),
        "B7: a function": Case(
            [node("F", ["x", "w"], ["t"], domain="local"), node("MatMul", ["t", "v"], ["y"])],
            {"v": _random(96, 32)}, functions=[local],
        ),
        "B7: Einsum": Case([node("Einsum", ["x", "w"], ["y"], equation="bk,kn->bn")]),
        "B8: omitted outputs": Case(
            [node("LSTM", ["x", "lw", "lr"], ["l", "", ""], hidden_size=32),
             node("Squeeze", ["l", "one"], ["t"]), node("MatMul", ["t", "v"], ["y"])],
            {"lw": _random(1, 128, 8), "lr": _random(1, 128, 32), "one": np.array([1]),
             "v": _random(32, 32)}, ("t", "b", 8), {"x": _random(5, 2, 8)},
        ),
        "B8: Squeeze of an open dimension": Case(
            [node("Squeeze", ["x", "one"], ["t"]), _LAST], {"one": np.array([1])},
            ("b", "e", 64), {"x": _random(4, 1, 64)},
        ),
        "B9: GlobalMaxPool of one dimension": Case(
            [node("GlobalMaxPool", ["x"], ["p"]), node("Flatten", ["p"], ["t"]), _LAST],
            shape=("b", 64, 10), feeds={"x": _random(2, 64, 10)},
        ),
        "B10: noise": Case(
            [node("RandomNormalLike", ["x"], ["n"]), node("Add", ["x", "n"], ["t"]), _LAST]
        ),
        "B10: Dropout in training": Case(
            [_LINEAR, node("Dropout", ["h", "half", "yes"], ["y"])],
            {"half": np.float32(0.5), "yes": np.array(True)},
        ),
        "B11: ZipMap": Case(
            [_LINEAR, node("Softmax", ["h"], ["p"]),
             node("ZipMap", ["p"], ["y"], domain=ML, classlabels_int64s=list(range(96)))],
            outputs=(maps,),
        ),
        "F9: a size from a shape": Case(
            [node("Shape", ["x"], ["s"], end=1), node("Mul", ["s", "k"], ["size"]), *_BIG],
            {"k": np.array([1 << 34])},
        ),
        "F9: a size from numbers": Case(
            [node("ReduceSum", ["x"], ["a"], keepdims=0), node("Abs", ["a"], ["p"]),
             node("Cast", ["p"], ["i"], to=i64), node("Add", ["i", "k"], ["size"]), *_BIG],
            {"k": np.array([1 << 36])},
        ),
        "F9: a size in a branch": Case(
            _chosen(huge, small, node("ReduceSum", ["t"], ["r"], keepdims=0), _LINEAR, _SUM),
            {"size": np.array([1 << 36]), **far},
        ),
        "F9: a loop that doubles": _loop(node("Concat", ["v", "v"], ["u"], axis=0), 40),
    }  # fmt: skip


def row(name: str, case: Case, folder: Path) -> list[str]:
    """What becomes of a file: exit, sites and refused, the distance or the words."""
    work = folder / "work"
    work.mkdir(parents=True)
    path = work / "m.onnx"
    onnx.save(case.model(), path)
    ended = command(folder, ["m.onnx", "-p", RECIPE, "-o", "out"])
    if ended.status:
        return [name, str(ended.status), "", _words(ended)]
    step = json.loads((work / "out" / "graphwright.json").read_text())["passes"][-1]
    sites = f"{len(step['sites'])}, {len(step['refused'])}"
    feeds = {n: torch.from_numpy(np.asarray(a)) for n, a in case.feeds.items()}
    right, artifact = (compile_model(p, optimize=False)(**feeds) for p in (path, work / "out"))
    worst = max(compare(right, artifact).values(), key=lambda gap: gap.rms)
    return [name, "0", sites, f"{worst.rel_l2:.2g}"]


def _words(ended: Ended) -> str:
    text = " ".join(ended.output.rpartition("error: ")[2].split())
    return text if len(text) <= WORDS else f"{text[:WORDS].rstrip()} ..."


def rows(pattern: str) -> Iterator[list[str]]:
    for name, case in cases().items():
        if fnmatch.fnmatchcase(name, pattern):
            with tempfile.TemporaryDirectory(prefix="causes-") as folder:
                yield row(name, case, Path(folder) / "case")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a command ended with neither 0 nor 2."""
    parser = argparse.ArgumentParser(prog="onnx_causes", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="such as 'B7*'")
    every = list(rows(parser.parse_args(arguments).only))
    print("| file | exit | sites, refused | rel. L2, or what is said |\n| --- | --- | --- | --- |")
    for cells in every:
        print(f"| {' | '.join(cells)} |")
    return int(any(cells[1] not in ("0", "2") for cells in every))


if __name__ == "__main__":
    raise SystemExit(main())
