"""``python -m graphwright.tools.bench.latency_table MODEL -o FILE``: times for ``ziplm``.

Every place of one signature (heads or units of linears of one size) is made smaller at once, and
the whole model is timed in ONNX Runtime, in turns with the model as it is: what a place saves is
the difference, by how many places there are. So attention, activations and caches of the processor
count as they do in the model. Run it where the model is to run, with the ``--tokens`` and
``--threads`` that it is to have. ``--speedup N --calib DATA`` then asks ``ziplm`` for that and
times the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...backends.base import Executable
from ...backends.registry import compile
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...passes.base import Context, PassResult
from ...passes.manager import optimize
from ...passes.weights.structured import Place, find_places, take_away
from ..cli.benchmark import in_turns
from ..data import calibration
from .showing import ended

SHARES = (0.75, 0.5, 0.35, 0.25, 0.12, 0.05)
"""Of the units of a feed-forward, what stays in the sizes that are timed, and one unit."""
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """How the model is run."""

    inputs: Inputs
    threads: int
    rounds: int


def sizes(place: Place) -> list[int]:
    """Sizes to time, ascending, without the whole."""
    if place.kind == "heads":
        return list(range(1, place.count))
    return sorted({1, *(max(1, round(place.count * share)) for share in SHARES)})


def latency_table(view: View, setting: Setting) -> dict[str, object]:
    """The table of a canonical graph, as ``ziplm`` reads it; times in milliseconds.

    Raises ``BadInput`` where nothing of the graph can shrink.
    """
    groups: dict[str, list[Place]] = {}
    for place in find_places(Context(view), PassResult(), ("heads", "units")):
        groups.setdefault(place.signature, []).append(place)
    if not groups:
        raise BadInput("no place of this model can lose heads or units")
    totals, places = [], {}
    for signature, members in groups.items():
        counts = sizes(members[0])
        smaller = [_shrunk(view, signature, size) for size in counts]
        whole, *times = timed([view, *smaller], setting)
        saved = [max(0.0, whole - spent) / len(members) for spent in times]
        # A larger place saves no more than a smaller one, whatever the clock says.
        for i in range(len(saved) - 2, -1, -1):
            saved[i] = max(saved[i], saved[i + 1])
        places[signature] = {"sizes": [*counts, members[0].count], "saved_ms": [*saved, 0.0]}
        totals.append(whole)
    return {"total_ms": min(totals), "places": places}


def _shrunk(view: View, signature: str, size: int) -> View:
    """A copy in which the places of a signature keep their first ``size`` heads or units."""
    copy = view.copy()
    context = Context(copy)
    places = find_places(context, PassResult(), ("heads", "units"))
    chosen = [place for place in places if place.signature == signature]
    kept = {place.name: list(range(size)) for place in chosen}
    take_away(context, kept, chosen, {}, PassResult(), "latency-table")
    copy.drop_unused_weights()
    return copy


def timed(views: Sequence[View], setting: Setting) -> list[float]:
    """The least time of each graph in ms, all of them run in turns."""
    compiled = [compile(v, backend="onnxruntime", threads=setting.threads) for v in views]
    runners = {str(i): partial(_run, executable) for i, executable in enumerate(compiled)}
    seconds = in_turns(runners, setting.inputs, setting.rounds)
    return [1000 * min(seconds[str(i)]) for i in range(len(views))]


def _run(executable: Executable, inputs: Inputs) -> object:
    return executable(**inputs)


def inputs_of(view: View, tokens: int) -> Inputs:
    """One row of ``tokens`` tokens, or one picture."""
    own = view.source.samples or [sample_inputs(view)]
    inputs = {}
    for name, tensor in own[0].items():
        row = tensor[:1]
        if row.dim() == 2:
            row = row.repeat(1, -(-tokens // row.shape[1]))[:, :tokens]
        inputs[name] = row.contiguous()
    return inputs


def _check(view: View, table: Path, speedup: float, calib: str, setting: Setting) -> Table:
    """What was asked of ``ziplm``, what the table predicts, and what the clock says."""
    data = calibration.read(calib, view).batches
    done = optimize(view, f"ziplm{{speedup={speedup} table={table}}}", calibration=data)
    before, after = timed([view, done.graph], setting)
    predicted = done.report.passes[0].result.notes[-1].split()[0]
    shown = Table("asked", "by the table", "measured", "ms before", "ms after")
    shown.add_row(f"{speedup:.2f}", predicted, f"{before / after:.2f}", f"{before:.2f}",
                  f"{after:.2f}")  # fmt: skip
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file and print."""
    parser = argparse.ArgumentParser(
        prog="latency_table", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--speedup", type=float, help="ask ziplm for it and time the result")
    parser.add_argument("--calib", default="", metavar="DATA", help="for --speedup")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        graph = load(options.model, cache=False)
        setting = Setting(inputs_of(graph, options.tokens), options.threads, options.rounds)
        view = graph.copy()
        canonicalize(view)
        table = latency_table(view, setting)
        options.output.write_text(json.dumps(table, indent=1))
        console.print_json(data=table)
        if options.speedup:
            console.print(_check(graph, options.output, options.speedup, options.calib, setting))

    return ended(show, width=140)


if __name__ == "__main__":
    raise SystemExit(main())
