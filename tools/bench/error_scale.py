"""What a relative L2 error of the outputs means: rounding at several widths, and what changes.

``python -m graphwright.tools.bench.error_scale``: for zoo models the relative L2 of an output
against the source, and beside it the share of predictions (of sentences: of nearest neighbours)
that stay the source's. The words of ``tools/report/meaning.py`` are made of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backends.runtimes.original import load
from ...ir.run.sweep import sweep
from ...passes.manager import optimize

MODELS = ("zoo:tiny-llama", "zoo:tiny-vit", "zoo:minilm")
BITS = (8, 4, 3, 2)


def main() -> None:
    for name in MODELS:
        graph = load(name, cache=False)
        batches = (graph.source.samples or [])[:2]
        for bits in BITS:
            done = optimize(graph, f"quantize{{bits={bits} group=32}}", samples=batches)
            output = graph.output_names()[0]
            source = [sweep(graph, batch)[output] for batch in batches]
            outputs = [row[output] for row in done.outputs]
            error = done.report.errors[output].rel_l2
            print(
                f"{name} {output} bits={bits} rel. L2 {error:.3g}: "
                f"{_kept(source, outputs):.3f} kept"
            )


def _kept(source: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
    """The share of equal most likely entries; of vectors, of equal nearest neighbours."""
    pairs = list(zip(source, outputs, strict=True))
    if source[0].dim() == 2 and source[0].shape[-1] > 200:
        pairs = [(_near(a), _near(b)) for a, b in pairs]
    hits = [(a.argmax(-1) == b.argmax(-1)).float().flatten() for a, b in pairs]
    return float(torch.cat(hits).mean())


def _near(vectors: torch.Tensor) -> torch.Tensor:
    """Cosines with the others of a batch, that with itself left out."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-1.0)


if __name__ == "__main__":
    main()
