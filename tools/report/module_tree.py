"""A graph by module path, as the manifest holds it and the report shows it."""

from __future__ import annotations

from collections.abc import Hashable

from ...ir.core.view import View
from .manifest import TreeEntry


def module_tree(view: View) -> TreeEntry:
    """Ops and weight bytes of each module; a weight that several share is counted where it is used
    first."""
    root = _empty("")
    by_path = {"": root}
    seen: set[Hashable] = set()
    for node in view.nodes():
        module = _module(by_path, view.scope(node))
        op = view.op(node)
        name = view.native_op(node) if op == "native" else op
        module.ops[name] = module.ops.get(name, 0) + 1
        for value in view.arguments(node):
            weight = view.weight(value)
            if weight is not None and weight.key not in seen:
                seen.add(weight.key)
                module.params_bytes += weight.nbytes
    return root


def _module(by_path: dict[str, TreeEntry], path: str) -> TreeEntry:
    """The tree's entry for a dotted path; missing ones are added from the root down."""
    parts = path.split(".") if path else []
    entry = by_path[""]
    for depth, part in enumerate(parts, 1):
        key = ".".join(parts[:depth])
        if key not in by_path:
            by_path[key] = _empty(part)
            entry.children.append(by_path[key])
        entry = by_path[key]
    return entry


def _empty(name: str) -> TreeEntry:
    return TreeEntry(name=name, ops={}, params_bytes=0, children=[])
