"""One folder of several paths: ``python -m graphwright.tools.bench.entry_paths [MODEL [RECIPE]]``.

Bytes of each file of the artifact, of the weights that each path reads, and the time in which
ONNX Runtime opens each (median of five, in turns, graph optimisation on).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ...backends import compile as compile_model
from ...backends import export
from ...ir.load.sources import load
from ...ir.structure.recognize import last_tower, recognize
from ...passes.manager import optimize

ROUNDS = 5


def opened(folder: Path, path: str | None) -> float:
    began = time.perf_counter()
    compile_model(folder, path=path, threads=1)
    return time.perf_counter() - began


def main(model: str, recipe: str) -> None:
    graph = load(model)
    result = optimize(graph, recipe, samples=(graph.source.samples or [])[:1] or None)
    last = len(last_tower(recognize(result.graph))) - 1
    paths = {"fast": f"0-{last // 2},{last}", "short": f"0,{last}", "deep": f"0-{last},{last}"}
    with tempfile.TemporaryDirectory() as place:
        out = export(result.graph, Path(place) / "out", paths=paths)
        for file in sorted(out.glob("*.onnx*")):
            print(f"{file.name:20} {file.stat().st_size:12} bytes")
        entries = json.loads((out / "graphwright.json").read_text())["paths"]
        times: dict[str | None, list[float]] = {name: [] for name in (None, *paths)}
        for _ in range(ROUNDS):
            for name, column in times.items():
                column.append(opened(out, name))
        for name, column in times.items():
            whole = {"blocks": f"0-{last}", "weight_bytes": "", "added_bytes": ""}
            known = entries.get(name, whole)
            print(
                f"{name or 'whole':8} {known['blocks']:12} reads {known['weight_bytes']!s:>11} "
                f"adds {known['added_bytes']!s:>4} opens in {statistics.median(column):.3f} s"
            )


if __name__ == "__main__":
    arguments = [*sys.argv[1:], "zoo:tiny-llama", "quantize{bits=4 group=32}"]
    main(arguments[0], arguments[1] if len(sys.argv) != 2 else arguments[2])
