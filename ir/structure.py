"""What a person sees in a graph. (provisional)"""
from __future__ import annotations
from dataclasses import dataclass
from .view import Node, Value, View

@dataclass(frozen=True)
class Linear:
    node: Node
    x: Value
    weight: Value
    bias: Value | None
    out: Value
    name: str
    in_features: int
    out_features: int
    block: int | None = None
    role: str = ""

@dataclass(frozen=True)
class Structure:
    linears: tuple[Linear, ...]
    attentions: tuple[Node, ...] = ()
    blocks: tuple[int, ...] = ()

def recognize(view: View) -> Structure:
    found = []
    for node in view.nodes():
        op = view.op(node)
        if op not in ("linear", "linear_nbit"):
            continue
        operands = view.operands(node)
        w = view.weight(operands[1])
        if w is None:
            continue
        bias = operands[2] if op == "linear" and len(operands) > 2 else None
        k, n = (w.shape[1], w.shape[0]) if op == "linear" else (view.attrs(node)["in_features"], view.attrs(node)["out_features"])
        found.append(Linear(node, operands[0], operands[1], bias, view.results(node)[0], view.scope(node) or view.name(node), k, n))
    return Structure(tuple(found), tuple(n for n in view.nodes() if view.op(n) == "sdpa"))
