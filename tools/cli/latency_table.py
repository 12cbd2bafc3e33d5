"""``optimize-model bench MODEL --ziplm-table FILE``: what heads and units of a model cost.

Every place of one signature (heads or units of linears of one size) is made smaller at once, and
the whole model is timed in ONNX Runtime, in turns with the model as it is: what a place saves is
the difference, by how many places there are. So attention, activations and caches of the processor
count as they do in the model. It is to be made where the model is to run, with the length and the
threads that it is to have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...backends.base import Executable
from ...backends.registry import compile
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...passes.base import Context, PassResult
from ...passes.weights.structured import Place, find_places, take_away
from .benchmark import in_turns

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
    """The least time of each graph in ms, all of them run in turns; of one thread the processor's
    time, on which what else runs there weighs less."""
    compiled = [compile(v, backend="onnxruntime", threads=setting.threads) for v in views]
    runners = {str(i): partial(_run, executable) for i, executable in enumerate(compiled)}
    clock = time.process_time if setting.threads == 1 else time.perf_counter
    seconds = in_turns(runners, setting.inputs, setting.rounds, clock)
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


def write(model: str, file: Path, *, length: int, repeats: int, trust: bool) -> None:
    """Measure a model and write the table. Raises what ``load`` and ``latency_table`` raise."""
    view = load(model, cache=False, trust_remote_code=trust)
    setting = Setting(inputs_of(view, length), torch.get_num_threads(), repeats)
    canonicalize(view)
    file.write_text(json.dumps(latency_table(view, setting), indent=1))
