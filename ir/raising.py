"""(provisional)"""
from __future__ import annotations
from typing import Any
from .rewrite import RewriteReport, rewrite
from .rule import Rule
from .view import View

class A(Rule):
    """matmul(x, transpose(w)) => linear(x, w)"""
    name = "raise-linear-transposed"
    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, p.transpose(w, perm=(1, 0)))
    def where(self, match: Any) -> None:
        match.weight("w")
    def replace(self, build: Any, x: Any, w: Any) -> Any:
        return build.linear(x, w)
class B(Rule):
    """matmul(x, w) => linear(x, w.T)"""
    name = "raise-linear"
    def pattern(self, p: Any, x: Any, w: Any) -> Any:
        return p.matmul(x, w)
    def where(self, match: Any) -> None:
        if len(match.weight("w").shape) != 2:
            match.refuse("w is no matrix")
    def replace(self, build: Any, x: Any, w: Any) -> Any:
        v = build.view
        return build.linear(x, v.add_weight(v.name(w) + ".T", v.weight(w).transposed()))
class C(Rule):
    """add(linear(x, w), b) => linear(x, w, b)"""
    name = "raise-bias"
    def pattern(self, p: Any, x: Any, w: Any, b: Any) -> Any:
        return p.add(p.linear(x, w), b)
    def where(self, match: Any) -> None:
        if match.weight("b").shape != (match.weight("w").shape[0],):
            match.refuse("b is no bias")
    def replace(self, build: Any, x: Any, w: Any, b: Any) -> Any:
        return build.linear(x, w, b)

def raise_graph(view: View) -> RewriteReport:
    r = rewrite(view, [A(), B(), C()])
    view.drop_unused_weights()
    return r
