"""``python -m graphwright.tools.bench.path_cost DIR``: what a low-rank path costs a decode step.

A random decoder of six layers in the shape of Qwen2-0.5B, whose head has the share of a step that
it has there, is quantized to 4 bits, and compensated by ``eora`` in each form that its factors may
have. All artifacts lie in ``DIR``, one that is there is not made again. One step of one token is
timed in ONNX Runtime, all in turns within a round: a round gives one ratio to the artifact without
a path, and their median counts. Bytes are those of the weights that a step reads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...backends.artifacts.exporting import export
from ...backends.runtimes.original import load
from ..run.named_model import optimize
from .checkpoints import SHAPES, write
from .decode import Step
from .showing import ended

LAYERS = 6
CODED = "quantize{bits=4 group=32}"
FORMS: Mapping[str, str] = {
    "no path": "",
    "float16, widened": "eora{rank=32}",
    "8 bits, in floats": "eora{rank=32 factor_bits=8 accuracy_level=0}",
    "8 bits": "eora{rank=32 factor_bits=8}",
    "4 bits": "eora{rank=32 factor_bits=4}",
    "4 bits, rank 16": "eora{rank=16 factor_bits=4}",
}
"""By name, the pass behind ``CODED``."""


def artifacts(folder: Path) -> dict[str, Path]:
    """An artifact of each form, made where it is missing."""
    source = folder / "source"
    if not source.exists():
        whole = SHAPES["q05"]
        vocab = whole.vocab * LAYERS // whole.layers
        write(replace(whole, layers=LAYERS, vocab=vocab), source)
    ids = torch.randint(3, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    folders = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in FORMS}
    for name, path in folders.items():
        if not path.exists():
            passes = ",".join(filter(None, (CODED, FORMS[name])))
            result = optimize(load(source), passes, calibration=data, target="cpu")
            export(result.graph, path, report=result.report, target="cpu")
    return folders


def ratios(
    folders: Mapping[str, Path], *, past: int, threads: int, rounds: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """By form: the least milliseconds of a step, and the median ratio to the first form."""
    steps = {name: Step(path, threads) for name, path in folders.items()}
    for step in steps.values():
        step.prepare(past)
        step.run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(min(step.run() for _ in range(repeats)) * 1e3)
    first = next(iter(times.values()))
    medians = {name: statistics.median(a / b for a, b in zip(row, first, strict=True))
               for name, row in times.items()}  # fmt: skip
    return {name: min(row) for name, row in times.items()}, medians


def table(folders: Mapping[str, Path], past: int, threads: int, rounds: int) -> Table:
    """A row a form."""
    import onnxruntime as ort

    least, medians = ratios(folders, past=past, threads=threads, rounds=rounds, repeats=5)
    title = f"a step behind {past} tokens, ONNX Runtime {ort.__version__}, threads: {threads}"
    result = Table(title=title, title_justify="left")
    for name in ("path", "ms", "ratio", "MB", "of bytes"):
        result.add_column(name, justify="left" if name == "path" else "right")
    sizes = {name: _nbytes(path) for name, path in folders.items()}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        cells = f"{least[name]:.2f}", f"{medians[name]:.3f}", f"{size / 1e6:.1f}"
        result.add_row(name, *cells, f"{size / first:.3f}")
    return result


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the artifacts, measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="path_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        folders = artifacts(options.folder)
        console.print(table(folders, options.past, options.threads, options.rounds))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
