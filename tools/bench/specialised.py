"""What special cases of a model save: ``python -m graphwright.tools.bench.specialised [MODEL]``.

For each case bytes of the model's files, the time of a prompt of 64 tokens and of a step behind it
in ONNX Runtime, before and after in turns, and how far the outputs are from those of the whole
model on what remains (relative L2). The last two rows are of texts behind a prefix of 64 tokens,
which the whole model reads with each, and which is baked into the other. MODEL is a folder or a
zoo model that writes text with a ``tokenizer.json``; ``zoo:tiny-llama`` where none is named.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...backends import Executable, export
from ...backends import compile as compile_model
from ...ir.load.sources import load
from ...ir.structure.cache_slots import later
from ...passes.manager import optimize

TEXT = Path(__file__).resolve().parents[2] / "README.md"
CASES = {
    "the whole model": "clean",
    "words of README.md": f"vocabulary{{text={TEXT}}}",
    "two answers": "restrict-head{tokens=[100 200]}",
    "both": f"vocabulary{{text={TEXT}}},restrict-head{{tokens=[100 200]}}",
    "prefix read": "clean",
    "prefix baked": "bake-prefix{tokens=[1-64]}",
}
ROUNDS, TOKENS, PREFIX = 30, 64, 64


def inputs_of(run: Executable, rows: int, count: int) -> list[dict[str, torch.Tensor]]:
    """A prompt of ``count`` tokens, and the step behind it."""
    ids = torch.arange(count)[None] % rows
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    step = later(prompt, run(**prompt), 1)
    return [prompt] if step is None else [prompt, step]


def seconds(run: Executable, inputs: Mapping[str, torch.Tensor]) -> float:
    began = time.perf_counter()
    run(**inputs)
    return time.perf_counter() - began


def main(model: str) -> None:
    graph = load(model)
    samples = (graph.source.samples or [])[:1] or None
    runs, inputs, sizes, errors = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as place:
        for name, recipe in CASES.items():
            result = optimize(graph, recipe, samples=samples)
            out = export(result.graph, Path(place) / name.replace(" ", "-"))
            sizes[name] = sum(f.stat().st_size for f in out.glob("model.onnx*"))
            errors[name] = max(d.rel_l2 for d in result.report.errors.values())
            runs[name] = compile_model(out, threads=1)
            count = TOKENS + PREFIX if name == "prefix read" else TOKENS
            inputs[name] = inputs_of(runs[name], 90, count)
        times: dict[str, list[list[float]]] = {name: [[] for _ in inputs[name]] for name in CASES}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                for column, feeds in zip(times[name], inputs[name], strict=True):
                    column.append(seconds(run, feeds))
    print(f"{model}: bytes, ms of a prompt of {TOKENS} tokens, ms of a step, rel. L2")
    for name in CASES:
        parts = " ".join(f"{1000 * statistics.median(column):8.2f}" for column in times[name])
        print(f"{name:20} {sizes[name]:12} {parts} {errors[name]:10.2g}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "zoo:tiny-llama")
