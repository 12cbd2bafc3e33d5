"""Time of one rewrite rule on one graph: our engine beside the rewriters that people use today.

The rule is ``mul(x, sigmoid(x)) => silu(x)``. The graph is a residual chain: a third of the nodes
take part in a match, a sixth come near (``mul(x, tanh(x))``) and the rest have nothing of it. All
contenders rewrite their own fresh copy in one process, one after the other, repeated; the least
time of each counts. The rivals are set up as cheaply as they can be: patterns are compiled before
the clock starts, theirs holds one order of operands where ours tries both, and they neither type
nor mark what they insert.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from rich.console import Console
from rich.table import Table

from ...ir.core.view import Operand, Source, Value
from ...ir.fx.view import FxView
from ...ir.onnx.view import OnnxView
from ...ir.rewrite.driver import rewrite
from ...ir.rewrite.rule import Build, Rule

aten = torch.ops.aten

SIZES = (1_000, 10_000, 100_000)
REPEATS = 3
LIMIT_S = 60.0
"""A contender is skipped where its time, extrapolated from the two sizes before, is above this."""
ONCE_S = 10.0
"""A contender that takes longer than this is not repeated."""
_UNIT = 12
_MATCHES_PER_UNIT = 2


class FuseSilu(Rule):
    """mul(x, sigmoid(x)) => silu(x)"""

    name = "fuse-silu"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def replace(self, build: Build, x: Operand) -> Value:
        return build.silu(x)


Run = Callable[[], int]
"""Rewrites a graph that was made before; answers the number of rewrites."""


@dataclass(frozen=True)
class Contender:
    """``prepare`` makes a fresh graph of about so many nodes and the timed call."""

    name: str
    kind: str
    prepare: Callable[[int], Run]
    ours: bool = False


@dataclass(frozen=True)
class Timing:
    """The least seconds over the repeats; ``None`` where skipped, ``estimate`` then says why."""

    contender: Contender
    nodes: int
    seconds: float | None
    estimate: float | None = None


def fx_graph(nodes: int) -> torch.fx.Graph:
    """The chain as an FX graph of ATen calls over one input."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = type_ = torch.empty(4, 8, device="meta")

    def call(target: Any, *args: torch.fx.Node) -> torch.fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = type_
        return node

    for _ in range(nodes // _UNIT):
        a = call(aten.add.Tensor, call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)), x)
        u = call(aten.mul.Tensor, a, call(aten.tanh.default, a))
        b = call(aten.add.Tensor, call(aten.mul.Tensor, u, call(aten.sigmoid.default, u)), a)
        c = call(aten.relu.default, call(aten.neg.default, b))
        x = call(aten.sub.Tensor, call(aten.maximum.default, c, a), b)
    graph.output((x,))
    return graph


def onnx_model(nodes: int) -> onnx_ir.Model:
    """The same chain as an ONNX model of opset 20."""
    type_, shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape((4, 8))
    start = onnx_ir.Value(name="x", type=type_, shape=shape)
    chain: list[onnx_ir.Node] = []

    def call(op_type: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        node = onnx_ir.Node("", op_type, inputs, name=f"n{len(chain)}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"v{len(chain)}", type_, shape
        chain.append(node)
        return value

    x = start
    for _ in range(nodes // _UNIT):
        a = call("Add", call("Mul", x, call("Sigmoid", x)), x)
        u = call("Mul", a, call("Tanh", a))
        b = call("Add", call("Mul", u, call("Sigmoid", u)), a)
        x = call("Sub", call("Max", call("Relu", call("Neg", b)), a), b)
    graph = onnx_ir.Graph([start], [x], nodes=chain, opset_imports={"": 20}, name="chain")
    return onnx_ir.Model(graph, ir_version=10)


def _ours_fx(nodes: int) -> Run:
    view = FxView(fx_graph(nodes), None, {}, (("x",), ("y",)), Source(), {})
    return lambda: rewrite(view, [FuseSilu()]).total


def _ours_onnx(nodes: int) -> Run:
    view = OnnxView(onnx_model(nodes))
    return lambda: rewrite(view, [FuseSilu()]).total


def _subgraph_rewriter(nodes: int) -> Run:
    from torch.fx.subgraph_rewriter import replace_pattern

    module = torch.fx.GraphModule({}, fx_graph(nodes))
    pattern, replacement = torch.fx.Graph(), torch.fx.Graph()
    x = pattern.placeholder("x")
    sigmoid = pattern.call_function(aten.sigmoid.default, (x,))
    pattern.output(pattern.call_function(aten.mul.Tensor, (x, sigmoid)))
    replacement.output(
        replacement.call_function(aten.silu.default, (replacement.placeholder("x"),))
    )
    before, after = torch.fx.GraphModule({}, pattern), torch.fx.GraphModule({}, replacement)
    return lambda: len(replace_pattern(module, before, after))


def _inductor(nodes: int) -> Run:
    from torch._inductor.pattern_matcher import (
        CallFunction,
        KeywordArg,
        PatternMatcherPass,
        register_graph_pattern,
    )

    module = torch.fx.GraphModule({}, fx_graph(nodes))
    pass_ = PatternMatcherPass()
    x = KeywordArg("x")
    pattern = CallFunction(aten.mul.Tensor, x, CallFunction(aten.sigmoid.default, x))

    def handler(match: Any, x: torch.fx.Node) -> None:
        new = match.graph.call_function(aten.silu.default, (x,))
        match.output_node().replace_all_uses_with(new)
        match.erase_nodes()

    register_graph_pattern(pattern, pass_dict=pass_)(handler)
    return lambda: pass_.apply(module)


def _onnxscript(nodes: int) -> Run:
    from onnxscript.rewriter import pattern as onnxscript_pattern

    model = onnx_model(nodes)
    rule = onnxscript_pattern.RewriteRule(
        lambda op, x: op.Mul(x, op.Sigmoid(x)),
        lambda op, x: op.silu(x, _domain="graphwright"),
    )
    rules = onnxscript_pattern.RewriteRuleSet([rule])
    return lambda: int(rules.apply_to_model(model))


CONTENDERS = (
    Contender("graphwright", "fx", _ours_fx, ours=True),
    Contender("inductor pattern matcher", "fx", _inductor),
    Contender("torch.fx subgraph_rewriter", "fx", _subgraph_rewriter),
    Contender("graphwright", "onnx", _ours_onnx, ours=True),
    Contender("onnxscript rewriter", "onnx", _onnxscript),
)


def measure(
    sizes: Sequence[int] = SIZES, repeats: int = REPEATS, limit_s: float = LIMIT_S
) -> list[Timing]:
    """Time every contender at every size, smallest size first.

    Raises ``RuntimeError`` where a contender does not find every match.
    """
    timings: dict[tuple[Contender, int], Timing] = {}
    for size in sizes:
        estimates = {c: _extrapolate(timings, c, sizes, size) for c in CONTENDERS}
        running = [c for c in CONTENDERS if (estimates[c] or 0.0) <= limit_s]
        best: dict[Contender, float] = {}
        for turn in range(repeats):
            for contender in running:
                if turn and best[contender] > ONCE_S:
                    continue
                seconds = _time(contender, size)
                best[contender] = min(seconds, best.get(contender, seconds))
        for contender in CONTENDERS:
            timings[contender, size] = Timing(
                contender, size, best.get(contender), estimates[contender]
            )
    return list(timings.values())


def _time(contender: Contender, nodes: int) -> float:
    run = contender.prepare(nodes)
    gc.collect()
    start = time.process_time()
    count = run()
    seconds = time.process_time() - start
    expected = nodes // _UNIT * _MATCHES_PER_UNIT
    if count != expected:
        raise RuntimeError(f"{contender.name} made {count} rewrites of {expected}")
    return seconds


def _extrapolate(
    timings: dict[tuple[Contender, int], Timing],
    contender: Contender,
    sizes: Sequence[int],
    size: int,
) -> float | None:
    """Seconds at a size, growing as between the two sizes before; ``None`` without two of them."""
    known = [(s, timings[contender, s]) for s in sizes if s < size]
    if len(known) < 2:
        return None
    (small, first), (large, second) = known[-2:]
    if second.seconds is None:
        return float("inf")
    assert first.seconds is not None
    order = math.log(second.seconds / first.seconds) / math.log(large / small)
    return float(second.seconds * (size / large) ** order)


def table(timings: Sequence[Timing]) -> Table:
    """Seconds by contender and size, their ratio to the best rival, and the growth at the end."""
    sizes = sorted({t.nodes for t in timings})
    result = Table(title="mul(x, sigmoid(x)) => silu(x): seconds (ratio to the best rival)")
    result.add_column("graph")
    result.add_column("engine", no_wrap=True)
    for size in sizes:
        result.add_column(f"{size:,} nodes", justify="right")
    if len(sizes) > 1:
        result.add_column(f"t({sizes[-1]:,}) / t({sizes[-2]:,})", justify="right")
    by_engine = {(t.contender, t.nodes): t for t in timings}
    for contender in dict.fromkeys(t.contender for t in timings):
        row = [by_engine[contender, size] for size in sizes]
        cells = [_cell(timing, _best_rival(timings, timing)) for timing in row]
        growth = [_growth(row[-2].seconds, row[-1].seconds)] if len(sizes) > 1 else []
        result.add_row(contender.kind, contender.name, *cells, *growth)
    return result


def _best_rival(timings: Sequence[Timing], timing: Timing) -> float | None:
    return min(
        (
            t.seconds
            for t in timings
            if t.nodes == timing.nodes
            and t.contender.kind == timing.contender.kind
            and not t.contender.ours
            and t.seconds is not None
        ),
        default=None,
    )


def _growth(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after / before:.1f}"


def _cell(timing: Timing, best: float | None) -> str:
    if timing.seconds is None:
        return f"skipped (~{timing.estimate:,.0f} s)"
    ratio = "" if best is None else f" ({timing.seconds / best:.2f})"
    return f"{timing.seconds:.4f}{ratio}"


def main(sizes: Sequence[int] = SIZES, repeats: int = REPEATS, limit_s: float = LIMIT_S) -> None:
    """Measure and print the table."""
    Console().print(table(measure(sizes, repeats, limit_s)))


if __name__ == "__main__":
    main()
