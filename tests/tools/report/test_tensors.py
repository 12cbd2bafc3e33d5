"""Where bytes are: by role, without what is small, and why a tensor is wider than it was."""

from __future__ import annotations

import onnx_ir as ir
import torch
from graphwright.ir.core.weights import ComputedWeight, MemoryWeight, Weight
from graphwright.ir.onnx.view import OnnxView
from graphwright.tools.report.tensors import tensors


def stored(**shapes: tuple[ir.DataType, tuple[int, ...]]) -> OnnxView:
    """A graph that holds tensors of these types, none of which can be read."""

    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a tensor was read")

    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    for name, (dtype, shape) in shapes.items():
        name = name.replace("__", ".")
        tensor = ir.LazyTensor(refuse, dtype, ir.Shape(shape), name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return OnnxView(ir.Model(graph, ir_version=10))


def weight(dtype: torch.dtype, *shape: int) -> Weight:
    key = ("zeros", dtype, shape)
    return ComputedWeight(lambda: torch.zeros(shape, dtype=dtype), shape, dtype, key)


def test_roles_and_what_became_wider() -> None:
    view = stored(
        h__0__up__codes=(ir.DataType.UINT8, (64, 32)),
        h__1__up__codes=(ir.DataType.UINT8, (64, 32)),
        h__0__up__scales__written=(ir.DataType.FLOAT, (64, 16)),
        h__1__up__scales__written=(ir.DataType.FLOAT, (64, 16)),
        row__scales__written=(ir.DataType.FLOAT, (64, 8)),
        embed=(ir.DataType.BFLOAT16, (32, 32)), head__columns=(ir.DataType.INT4, (64, 33)),
        norm=(ir.DataType.FLOAT, (16,)),
    )  # fmt: skip
    weights = {
        "h.0.up.codes": weight(torch.uint8, 64, 32), "h.0.up.scales": weight(torch.float16, 64, 16),
        "row.scales": weight(torch.float32, 64, 1), "head": weight(torch.uint8, 33, 64),
    }  # fmt: skip
    entries = tensors(
        view, weights, {"embed": MemoryWeight(torch.zeros(32, 32, dtype=torch.bfloat16))}
    )
    assert [(e.name, e.dtype, e.count, e.bytes) for e in entries] == [
        ("h.*.up.scales", "f32", 2, 8192), ("h.*.up.codes", "u8", 2, 4096),
        ("embed", "bf16", 1, 2048), ("row.scales", "f32", 1, 2048),
        ("head", "i4", 1, 1056),
    ]  # fmt: skip
    assert [e.wider for e in entries] == [
        "f32, which the runtime computes in, f16 before", "", "",
        "repeated for each block of a row, as the runtime reads it", "",
    ]  # fmt: skip
