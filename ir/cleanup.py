"""(provisional)"""
from __future__ import annotations
from .rewrite import RewriteReport
from .view import View

def clean(view: View) -> RewriteReport:
    report = RewriteReport()
    for node in list(view.nodes()):
        op = view.op(node)
        if op == "identity":
            src = view.operands(node)[0]
            if view.is_output(view.results(node)[0]) and view.kind == "onnx":
                continue
            view.replace(view.results(node)[0], src)
            view.erase(node)
            report.applied["identity"] += 1
        elif "_assert_" in view.native_op(node):
            view.erase(node)
            report.applied["assert"] += 1
    view.drop_unused_weights()
    return report

def fold_constants(view: View, max_bytes: int = 1 << 20) -> RewriteReport:
    return RewriteReport()
