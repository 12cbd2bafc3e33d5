"""Forms of a linear with 8-bit weights in ONNX Runtime: one thread, least of many runs.

``python -m graphwright.tools.bench.w8a8 [COLUMNSxROWS ...]`` prints milliseconds for 1, 16 and 128
tokens and the relative error on Gaussian inputs: ``linear_w8a8``, with symmetric and with other
ranges, and ``linear_w8a8_static`` as they are written for a CPU, the runtime's
``DynamicQuantizeMatMul``, ``MatMulNBits`` of 8 bits with ``accuracy_level=4``, float32. ``quality
[--samples N]`` prints for ranges by token and fixed ones, smoothed before and not: MiniLM's cosine,
tiny-llama's perplexity.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.tape import Tape

from ...ir.load.sources import load
from ...ir.ops.linear_w8a8 import FORM, LINEAR_W8A8
from ...passes.manager import optimize
from ..data import calibration
from ..evaluate import Subject, evaluate
from .showing import ended, growing

Array = NDArray[Any]
BLOCK, RUNS, TOKENS = 32, 60, (1, 16, 128)
RANGE = 4.0
"""Of the fixed form's activations; Gaussian ones beyond it are cut off."""
JUDGED = (("zoo:minilm", "embed", "cosine"), ("zoo:tiny-llama", "perplexity", "perplexity"))
RECIPES = ("w8a8", "w8a8{activations=static}", "smooth,w8a8", "smooth,w8a8{activations=static}")


def _session(nodes: list[Any], constants: dict[str, Array], rows: int, columns: int) -> Any:
    def value(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])

    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "bench", [value("x", columns)], [value("y", rows)], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return _opened(model)


def _opened(model: onnx.ModelProto) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _own(codes: Array, scales: Array, *, symmetric: bool) -> Any:
    """``linear_w8a8`` of codes [rows, columns] as it is written for a CPU."""
    tape = Tape()
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["tokens", codes.shape[1]]))
    x.dtype = onnx_ir.DataType.FLOAT
    operands = [
        onnx_ir.Value(
            name=n, shape=onnx_ir.Shape(a.shape), type=onnx_ir.TensorType(onnx_ir.tensor(a).dtype),
            const_value=onnx_ir.tensor(a, name=n),
        ) for n, a in (("codes", codes), ("scales", scales))
    ]  # fmt: skip
    attrs = {"in_features": codes.shape[1], "out_features": len(codes), "symmetric": symmetric}
    y = LINEAR_W8A8.forms[FORM](tape, [x, *operands, None], attrs)
    y.name, y.shape = "y", onnx_ir.Shape(["tokens", len(codes)])
    graph = onnx_ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=operands,
        opset_imports={"": 21, "com.microsoft": 1}, name="bench",
    )  # fmt: skip
    return _opened(onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)))


def forms(weight: Array) -> dict[str, Any]:
    """A session for each form of a matrix [rows, columns]."""
    rows, columns = weight.shape
    scales = np.abs(weight).max(1) / 127
    codes = np.round(weight / scales[:, None]).astype("i1").T.copy()
    blocks = weight.reshape(rows, -1, BLOCK)
    of_blocks = np.abs(blocks).max(2) / 127
    in_blocks = (np.round(blocks / of_blocks[..., None]) + 128).clip(0, 255).astype("u1")
    node = helper.make_node
    numbers: dict[str, Array] = {"w": codes, "s": scales, "zero": np.array(128, "u1")}
    fixed = [
        node("QuantizeLinear", ["x", "fixed", "zero"], ["xq"]),
        node("MatMulIntegerToFloat", ["xq", "w", "fixed", "s", "zero"], ["y"],
             domain="com.microsoft"),
    ]  # fmt: skip
    whole = node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    nbits = node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=8,
        block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    size, step = (rows, columns), np.array(RANGE / 127, "f4")
    return {
        "linear_w8a8": _own(codes.T.copy(), scales, symmetric=True),
        "linear_w8a8, asymmetric": _own(codes.T.copy(), scales, symmetric=False),
        "linear_w8a8_static": _session(
            fixed, numbers | {"fixed": step}, *size
        ),
        "DynamicQuantizeMatMul": _session([whole], {"w": codes, "s": scales}, *size),
        "MatMulNBits": _session([nbits], {"w": in_blocks, "s": of_blocks}, *size),
        "float32": _session([node("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}, *size),
    }


def times(sizes: Sequence[str]) -> Iterator[Sequence[str]]:
    rng = np.random.default_rng(0)
    for size in sizes:
        columns, rows = map(int, size.split("x"))
        weight = (rng.standard_normal((rows, columns)) * 0.05).astype("f4")
        for name, session in forms(weight).items():
            figures = []
            for tokens in TOKENS:
                x, least = rng.standard_normal((tokens, columns)).astype("f4"), np.inf
                for _ in range(RUNS):
                    started = time.perf_counter()
                    (y,) = session.run(None, {"x": x})
                    least = min(least, time.perf_counter() - started)
                error = np.linalg.norm(y - x @ weight.T) / np.linalg.norm(x @ weight.T)
                figures.append(f"{least * 1e3:.3f} ms ({error:.4f})")
            yield size, name, *figures


def quality(samples: int) -> Iterator[Sequence[str]]:
    for name, task, figure in JUDGED:
        graph = load(name) if task == "embed" else load(name, cache=False)
        data, folder = calibration.read(name, graph).batches, graph.source.folder
        source = Subject.of(graph, backend="onnxruntime", tokenizer=folder)
        for recipe in RECIPES:
            coded = optimize(graph, recipe, calibration=data).graph
            judged = Subject.of(coded, backend="onnxruntime", tokenizer=folder)
            result = evaluate(judged, task, reference=source, samples=samples)[task]
            low, high = result.interval[figure]
            yield name, recipe, f"{figure} {result.figures[figure]:.5g} ({low:.5g} to {high:.5g})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["1536x384", "2048x2048"],
                        help="sizes of matrices, or quality")  # fmt: skip
    parser.add_argument("--samples", type=int, default=40, help="texts to judge by")
    options = parser.parse_args(arguments)
    columns: Sequence[str] = ("K x N", "form", *(f"{n} tokens" for n in TOKENS))
    rows = times(options.what)
    if options.what == ["quality"]:
        columns, rows = ("model", "recipe", "figure"), quality(options.samples)
    return ended(lambda console: console.print(growing("w8a8", columns, rows)))


if __name__ == "__main__":
    raise SystemExit(main())
