"""What people give where a graph is taken."""

from __future__ import annotations

from .errors import BadInput
from .view import View


def check_graph(thing: object) -> None:
    """Raise ``BadInput`` for what is no graph, with what has or makes one."""
    if isinstance(thing, View):
        return
    advice = "gw.load(NAME) and gw.trace(module, inputs) make one"
    if hasattr(thing, "graph") and hasattr(thing, "report"):
        advice = "give its .graph (and report=its .report to export)"
    raise BadInput(f"a graph is taken, and this is a {type(thing).__name__}: {advice}")
