"""Forms of a linear with 8-bit weights in ONNX Runtime: one thread, least of many runs.

``python -m graphwright.tools.bench.w8a8 [COLUMNSxROWS ...]`` prints milliseconds for 1, 16 and 128
tokens and the relative error on Gaussian inputs: ``linear_w8a8`` as it is written, the runtime's
``DynamicQuantizeMatMul``, ``MatMulNBits`` of 8 bits with ``accuracy_level=4``, float32.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
BLOCK, RUNS, TOKENS = 32, 60, (1, 16, 128)


def _session(nodes: list[Any], constants: dict[str, Array], rows: int, columns: int) -> Any:
    def value(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])

    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "bench", [value("x", columns)], [value("y", rows)], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def forms(weight: Array) -> dict[str, Any]:
    """A session for each form of a matrix [rows, columns]."""
    rows, columns = weight.shape
    scales = np.abs(weight).max(1) / 127
    codes = np.round(weight / scales[:, None]).astype("i1").T.copy()
    blocks = weight.reshape(rows, -1, BLOCK)
    of_blocks = np.abs(blocks).max(2) / 127
    in_blocks = (np.round(blocks / of_blocks[..., None]) + 128).clip(0, 255).astype("u1")
    node = helper.make_node
    tokens = [
        node("Abs", ["x"], ["size"]), node("ReduceMax", ["size", "last"], ["most"], keepdims=1),
        node("Max", ["most", "least"], ["safe"]), node("Div", ["safe", "c127"], ["step"]),
        node("Div", ["x", "step"], ["steps"]), node("Round", ["steps"], ["whole"]),
        node("Add", ["whole", "c128"], ["moved"]),
        node("Cast", ["moved"], ["xq"], to=TensorProto.UINT8),
        node("MatMulInteger", ["xq", "w", "zero"], ["sums"]),
        node("Cast", ["sums"], ["wide"], to=TensorProto.FLOAT),
        node("Mul", ["wide", "step"], ["by_token"]), node("Mul", ["by_token", "s"], ["y"]),
    ]  # fmt: skip
    numbers: dict[str, Array] = {
        "w": codes, "s": scales, "last": np.array([-1]), "least": np.array(1e-30, "f4"),
        "c127": np.array(127, "f4"), "c128": np.array(128, "f4"), "zero": np.array(128, "u1"),
    }  # fmt: skip
    whole = node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    nbits = node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=8,
        block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    size = rows, columns
    return {
        "linear_w8a8": _session(tokens, numbers, *size),
        "DynamicQuantizeMatMul": _session([whole], {"w": codes, "s": scales}, *size),
        "MatMulNBits": _session([nbits], {"w": in_blocks, "s": of_blocks}, *size),
        "float32": _session([node("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}, *size),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    for size in sys.argv[1:] or ["1536x384", "2048x2048"]:
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
            print(f"{size} {name}: {', '.join(figures)}")


if __name__ == "__main__":
    main()
