"""How a module becomes a graph: one trace, its sizes left open."""
