"""One artifact, loaded in the size that there is room for: linears as stacks of one-bit blocks.

``python -m graphwright.tools.examples.any_size [OUT]``
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphwright as gw
import torch


def main(out: Path) -> dict[int, float]:
    graph = gw.load("zoo:tiny-vit")
    samples = (graph.source.samples or [])[:1]
    # With calibration=[...] and without scaling=none the inputs' sizes are learned from data.
    result = gw.optimize(graph, "bitstack{blocks=6 scaling=none}", samples=samples)
    gw.export(result.graph, out, report=result.report, force=True)
    whole = sum(file.stat().st_size for file in out.glob("model.onnx*"))
    expected = gw.compile(graph, backend="eager")(**samples[0])["logits"]
    errors = {}
    for share in (1.0, 0.8, 0.6):
        size = int(share * whole)
        run = gw.compile(gw.load(out, max_bytes=size), backend="eager")
        logits = run(**samples[0])["logits"]
        errors[size] = float(torch.linalg.norm(logits - expected) / torch.linalg.norm(expected))
        print(f"at most {size} bytes: relative L2 error {errors[size]:.3f}")
    return errors


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out-any"))
