"""``optimize-model bench MODEL --ziplm-table FILE``: what heads and units of a model cost.

Every place of one signature (heads or units of linears of one size) is made smaller at once, and
the whole model is timed in ONNX Runtime, in turns with the model as it is: what a place saves is
the difference, by how many places there are. So attention, activations and caches of the processor
count as they do in the model. It is to be made where the model is to run, with the length and the
threads that it is to have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.side_files import longest_text
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...passes.base import Context, PassResult
from ...passes.weights.structured import Place, find_places, take_away
from ..evaluate.turns import Inputs, Setting, timed
from ..run.machine import processor
from ..search.timing import one_row, table_of_model

LENGTH = 128
"""Tokens, where nothing else is asked for."""
SHARES = (0.75, 0.5, 0.35, 0.25, 0.12, 0.05)
"""Of the units of a feed-forward, what stays in the sizes that are timed, and one unit."""


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


def fitting(view: View, length: int | None) -> int:
    """The length to time at: as asked, else ``LENGTH``, or what the model takes where that is less.

    Raises ``BadInput`` where more is asked for than the model takes.
    """
    longest = longest_text(view.source.folder) if "input_ids" in view.input_names() else None
    if length is None:
        return min(LENGTH, longest or LENGTH)
    if longest is not None and length > longest:
        raise BadInput(
            f"--length {length} is more than the {longest} tokens that {view.source.name} takes"
        )
    return length


def inputs_of(view: View, tokens: int) -> Inputs:
    """One row of ``tokens`` tokens, or one picture, with the tokens that ask about it."""
    own = view.source.samples or [sample_inputs(view)]
    pictured = any(tensor.dim() > 2 for tensor in own[0].values())
    inputs = {}
    for name, tensor in own[0].items():
        row = tensor[:1]
        if row.dim() == 2 and not pictured:
            row = row.repeat(1, -(-tokens // row.shape[1]))[:, :tokens]
        inputs[name] = row.contiguous()
    return inputs


def write_times(
    model: str, file: Path, *, length: int | None, trust: bool,
    progress: Callable[[str, int, int], None],
) -> None:
    """Measure what a search's candidates take and write the table. Raises what ``load`` raises."""
    view = load(model, trust_remote_code=trust)
    inputs = inputs_of(view, fitting(view, length))
    canonicalize(view)
    table_of_model(view, one_row(view, inputs), processor(), progress).write(file)


def write(model: str, file: Path, *, length: int | None, repeats: int, trust: bool) -> None:
    """Measure a model and write the table. Raises what ``load`` and ``latency_table`` raise."""
    view = load(model, cache=False, trust_remote_code=trust)
    setting = Setting(inputs_of(view, fitting(view, length)), torch.get_num_threads(), repeats)
    canonicalize(view)
    file.write_text(json.dumps(latency_table(view, setting), indent=1))
