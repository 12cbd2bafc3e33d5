"""``python -m graphwright.tools.bench.experts``: what a layer of experts costs, by the picked ones.

A Mixtral of random weights and one layer, as an artifact in ONNX Runtime: milliseconds of a token
behind a prompt, and of the prompt, where the router picks 1, 2, 4 or all of the experts. The last
row is what it costs to run them all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MODEL_FILE, write_model
from ...backends.registry import compile as compile_model
from ...ir.load.sources import load
from ...passes.manager import optimize
from .families import save
from .family_models import DECODERS
from .family_table import Family
from .structure_table import print_table

EXPERTS, PROMPT, ROUNDS = 8, 64, 15


def measure(picked: int, width: int, passes: str) -> tuple[float, float]:
    """Milliseconds of a token and of a prompt, the medians of interleaved rounds."""
    mixtral = DECODERS["mixtral"]
    sizes = {
        **mixtral.sizes, "num_hidden_layers": 1, "hidden_size": width, "num_local_experts": EXPERTS,
        "num_experts": EXPERTS, "intermediate_size": 2 * width, "num_experts_per_tok": picked,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="graphwright-experts-") as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "out"
        save(Family(mixtral.model, mixtral.config, sizes), folder)
        view = load(folder)
        out.mkdir()
        write_model(lowered(optimize(view, passes).graph if passes else view).model, out)
        run = compile_model(out / MODEL_FILE)
        texts = [torch.arange(count)[None] % 90 for count in (1, PROMPT)]
        taken: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for ids, times in zip(texts, taken, strict=True):
                times.append(_seconds(run, ids))
    token, prompt = (1000 * statistics.median(times) for times in taken)
    return token, prompt


def _seconds(run: Any, ids: torch.Tensor) -> float:
    before = time.perf_counter()
    run(input_ids=ids, attention_mask=torch.ones_like(ids))
    return time.perf_counter() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="experts", description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--passes", default="", help="made of it first")
    asked = parser.parse_args(arguments)
    rows = []
    for picked in (1, 2, 4, EXPERTS):
        token, prompt = measure(picked, asked.width, asked.passes)
        rows.append((f"{picked} of {EXPERTS}", f"{token:.2f}", f"{prompt:.2f}"))
    columns = ("picked", "ms a token", f"ms a prompt of {PROMPT}")
    print_table(columns, rows, Console(), markdown=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
