"""A native op and a stored linear of a package outside, through a whole run on both graph kinds.

Nothing but their declarations (``outside_ops.py``) knows of them.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered, translated
from graphwright.backends.runtimes.triton_kernels import bind_kernels
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.types import Type
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.moves import swap
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.costs import graph_costs
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab import dense_weight, is_known, register, registry
from graphwright.kernels import registry as kernels
from graphwright.tools.cli.listing import _stored

KINDS = ("fx", "onnx")
FILE = Path(__file__).with_name("outside_ops.py")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.softplus(self.up(x)))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package, installed and found by its entry points; its ops are forgotten afterwards."""
    registry.load_dialects()
    tables: list[Any] = [registry.VOCABULARY, registry.ATEN_DECODERS, kernels._REGISTERED]
    before = [dict(table) for table in tables]
    before_onnx = {key: list(decoders) for key, decoders in registry.ONNX_DECODERS.items()}
    shutil.copy(FILE, tmp_path)
    info = tmp_path / "outside_ops-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: outside-ops\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[graphwright.ops]\nsoftplus = outside_ops:SOFTPLUS\n"
        "linear_int8 = outside_ops:LINEAR_INT8\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_dialects", [])
    registry.load_dialects()
    yield importlib.import_module("outside_ops")
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    registry.ONNX_DECODERS.clear()
    registry.ONNX_DECODERS.update(before_onnx)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run(outside: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(3, 6)
    traced = gw.trace(net, (x,))
    graph: View = traced if kind == "fx" else translated(traced)
    canonicalize(graph)
    ops = [graph.op(n) for n in graph.nodes()]
    assert ops == ["linear", "softplus", "linear", "add"]

    wide = recognize(graph).linears[0]
    codes, scales = outside.stored(net.up.weight.detach())
    weights = [("codes", MemoryWeight(codes)), ("scales", MemoryWeight(scales))]
    attrs = {"in_features": 6, "out_features": 10}
    swap(graph, wide, "linear_int8", weights, attrs, rule="test")

    linears = recognize(graph).linears
    assert [(x.name, x.quantized, x.out_features) for x in linears] == [
        (wide.name, True, 10), ("down", False, 6),
    ]  # fmt: skip
    assert linears[0].bias is not None
    assert [x.role for x in linears] == ["fc1", "fc2"]  # softplus is an activation between them
    assert graph_costs(graph, {"batch": 3}).macs == 3 * 2 * 60
    assert _stored(graph, linears[0]) == "int8 rows"
    assert torch.equal(dense_weight(graph, linears[0].node), codes.float() * scales)

    hidden = torch.nn.functional.linear(x, codes.float() * scales, net.up.bias)
    want = (x + net.down(torch.nn.functional.softplus(hidden))).detach()
    (swept,) = sweep(graph, {"x": x}).values()
    torch.testing.assert_close(swept, want, rtol=1e-5, atol=1e-6)
    (ran,) = gw.compile(graph, backend="onnxruntime")(x).values()
    torch.testing.assert_close(ran, want, rtol=1e-5, atol=1e-6)

    opened = lowered(graph)
    assert {n.domain for n in opened.nodes()} == {""}
    canonicalize(opened)
    (again, _) = recognize(opened).linears
    assert opened.op(again.node) == "linear_int8"
    assert torch.equal(dense_weight(opened, again.node), codes.float() * scales)

    kernels.register_kernel("linear_int8", kernels.Kernel(outside.linear_int8))
    assert [b.kernel for b in bind_kernels(graph, None).bound.values()] == [outside.linear_int8]


def test_its_samples_hold(outside: ModuleType) -> None:
    op = outside.LINEAR_INT8
    for sample in op.samples():
        types = [None if t is None else Type(t.dtype, tuple(t.shape)) for t in sample.operands]
        result = op.overload(*sample.operands, **sample.attrs)
        assert op.infer(types, sample.attrs) == (Type(result.dtype, tuple(result.shape)),)
        torch.library.opcheck(op.overload, sample.operands, dict(sample.attrs))


def test_what_contradicts_the_vocabulary_is_refused(outside: ModuleType) -> None:
    with pytest.raises(BadInput, match="there is an op 'softplus' already"):
        register(outside.SOFTPLUS)
    from dataclasses import replace

    other = replace(outside.SOFTPLUS, name="soft")
    with pytest.raises(BadInput, match=r"soft: aten.softplus.default is softplus already"):
        register(other)
    with pytest.raises(BadInput, match="soft: Softplus is softplus already"):
        register(replace(other, aten=None))
    bare = replace(outside.LINEAR_INT8, name="linear_bare", dense=None)
    with pytest.raises(BadInput, match="linear_bare: a stored linear declares dense"):
        register(bare)
    assert not is_known("soft")
    assert not is_known("linear_bare")
