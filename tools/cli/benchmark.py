"""``optimize-model bench OUT...``: artifacts beside their source, timed in turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.fx.view import FxView
from ...ir.rewrite.cleanup import clean
from ...ir.run.inputs import sample_inputs
from ..evaluate.turns import Runner, in_turns
from ..report import manifest
from ..run.named_source import load_named, located
from . import terminal
from .latency_table import fitting


def main(
    folders: Sequence[Path], batches: Sequence[int], length: int | None, *, device: str,
    repeats: int, trust_source: bool = False,
) -> None:  # fmt: skip
    """Print a table for each batch size: milliseconds, and the ratio to the fp32 source in ORT.

    Raises as ``named_source.load_named``.
    """
    known = [(manifest.load(folder).source, folder) for folder in folders]
    sources = {(located(x.name, x.beside, folder), x.part) for x, folder in known}
    if len(sources) != 1:
        names = sorted(f"{name} {part}".rstrip() for name, part in sources)
        raise BadInput(f"the artifacts come from different models: {', '.join(names)}")
    (name, part), = sources
    view = load_named(name, trusted=trust_source, cache=False, part=part)
    tokens = fitting(view, length)
    runners = _runners(view, folders, device)
    console = terminal.VisibleConsole()
    console.print(
        f"{view.source.name}, sequence {tokens}, {torch.get_num_threads()} threads, {device}, "
        f"median of {repeats} rounds taken in turns",
        markup=False, highlight=False,
    )  # fmt: skip
    times = {batch: _times(runners, _inputs(view, batch, tokens), repeats) for batch in batches}
    rows = {name: [times[batch][name] for batch in batches] for name in runners}
    columns = [f"batch {batch}" for batch in batches]
    console.print(terminal.bench_table("executable", columns, rows, next(iter(runners))))


def _runners(view: View, folders: Sequence[Path], device: str) -> dict[str, Runner]:
    runners: dict[str, Runner] = {}
    reference = compile_model(view, backend="onnxruntime", device=device)
    runners["ONNX Runtime fp32"] = _named(reference)
    if isinstance(view, FxView):
        runners["torch fp32"] = _torch_runner(view, torch.float32)
        runners["torch bf16"] = _torch_runner(view, torch.bfloat16)
    for folder in folders:
        compiled = compile_model(folder, backend="onnxruntime", device=device)
        runners[f"{folder.name} ({manifest.load(folder).recipe})"] = _named(compiled)
    return runners


def _named(executable: Executable) -> Runner:
    return lambda batch: executable(**batch)


def _torch_runner(view: FxView, dtype: torch.dtype) -> Runner:
    """The FX graph as a torch module with its weights in memory, under autocast for bf16."""
    view = view.copy()
    clean(view)  # of checks, too: torch 2.11 writes some about dtypes, which autocast changes
    module = view.to_module()

    def run(batch: Mapping[str, torch.Tensor]) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return module(*[batch[name] for name in view.input_names()])

    return run


def _inputs(view: View, batch: int, length: int) -> dict[str, torch.Tensor]:
    sizes: dict[str, int] = {}
    for value in view.inputs():
        for position, dim in enumerate(view.type(value).shape or ()):
            if isinstance(dim, str):
                sizes.setdefault(dim, batch if position == 0 else length)
    return sample_inputs(view, sizes=sizes)


def _times(
    runners: Mapping[str, Runner], inputs: Mapping[str, torch.Tensor], repeats: int
) -> dict[str, float]:
    """Median milliseconds of each."""
    taken = in_turns(runners, inputs, repeats)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
