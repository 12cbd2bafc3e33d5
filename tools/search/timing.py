"""The table of times, measured: whole models in ONNX Runtime, in turns with the source.

All linears of one size get a form at once, and what one adds is the difference by how many they
are: so caches of the processor, products that become one and what lies between count as they do in
the model. Numbers do not matter to a clock: nothing is fitted.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Value, View
from ...ir.structure.cache_slots import left_out
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import Linear, Structure, recognize
from ...ir.structure.units import Unit
from ...ir.structure.vision import find_image_tokens
from ...ir.vocab.targets import CPU, Target
from ...passes.base import Context, Pass
from ...passes.checkpoint_store import CheckpointStore, remembered
from ...passes.depth.path import FollowPath
from ...passes.recipe import Recipe
from ...passes.stored import reason_against_storing
from ...passes.tokens.token_pass import KeepPass
from ...passes.weights.factor_form import FactorForm, graft_group
from ..evaluate.turns import Setting, clock_by, compiled, timed_runs
from .cache_bits import NARROW, narrowed
from .data import Parts
from .forms import FAST, FED_BACK, PATHS, ROUNDED, Form, Path
from .heads import Site, sites_of, with_the_first
from .healing import healed_at_random
from .problem import Choice
from .recipe_of import Cut, Held, HeldCache, HeldTables, Thinned
from .skips import CUTS, may_go, units
from .tables import storable_tables
from .times import Times, signature

Progress = Callable[[str, int, int], None]
Clock = Callable[[Sequence[View]], list[float]]
"""Milliseconds of each of some graphs, the first of which is the source."""
SECONDS, FEWEST, MOST = 2.0, 8, 200
"""How long one set of graphs is timed, about, and how many rounds that may be. On a busy machine
the least of 10 runs of 0.6 ms differs by 5 % from one graph to its own copy, of 16 ms by 2 %."""
MACS_PER_MS = 4e7
"""Of the cost model, where nothing can be measured: float32 on one core of the reference CPU."""
UNDER_PATHS = Form("quantize", 4, 32)


def one_row(view: View, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One sample of a batch, with the empty cache that a graph may take."""
    row = {name: tensor[:1] if tensor.dim() else tensor for name, tensor in batch.items()}
    types = view.input_types()
    return {name: t.contiguous() for name, t in (row | left_out(types, row)).items()}


def clock_of(inputs: Mapping[str, torch.Tensor], threads: int, seconds: float = SECONDS) -> Clock:
    """What times graphs in turns on some inputs, the first of them, the source, at both ends.

    There it is two sessions, compiled anew for each set: one session that ends a turn and begins
    the next finds its weights in the processor's caches, as no other does, and a table made so said
    1.35 times of what whole recipes of zoo:tiny-vit took.
    """

    def clock(views: Sequence[View]) -> list[float]:
        runs = compiled([*views, views[0]], threads)
        (once,) = timed_runs(runs[:1], Setting(inputs, threads, 2))
        rounds = int(1e3 * seconds / (2 * len(runs) * once))
        setting = Setting(inputs, threads, min(MOST, max(FEWEST, rounds)))
        *times, again = timed_runs(runs, setting)
        return [min(times[0], again), *times[1:]]

    return clock


def can_measure(target: Target, *, large: bool) -> bool:
    """Whether this process can time artifacts for a target: others run elsewhere, and a large model
    does not fit a dozen times into memory."""
    return target.name == CPU.name and not large


@dataclass(frozen=True)
class Subject:
    """The model whose table is made, and what may change in it."""

    view: View
    structure: Structure
    target: Target
    forms: Sequence[Form] = ()
    paths: Sequence[Path] = ()
    tables: Sequence[HeldTables] = ()
    units: Sequence[Unit] = ()
    """All halves of blocks."""
    may_go: Sequence[Unit] = ()
    """Those of them that may be left out."""
    sites: Sequence[Site] = ()
    """What may lose heads or units."""
    cuts: Sequence[KeepPass] = ()
    """What may drop image tokens."""
    caches: Sequence[HeldCache] = ()
    """How keys and values may be kept."""
    heal: bool = True
    """Whether maps stand in for halves that are left out."""


@dataclass(frozen=True)
class Timing:
    """How the times of a model become known: from a table, by this machine's clock, or counted."""

    table: Times | None = None
    machine: str = ""
    """The processor that this process runs on."""

    def times(
        self, subject: Subject, batch: Mapping[str, torch.Tensor], data: Parts, progress: Progress,
        checkpoints: CheckpointStore | None,
    ) -> tuple[Times, str]:  # fmt: skip
        """The table, and what a person should know of it."""
        inputs = one_row(subject.view, batch)
        if self.table is not None:
            check_shapes(self.table, inputs)
            here = self.table.machine == self.machine
            named = f"{'this' if here else 'another'} machine: {self.table.machine}"
            return replace(self.table, here=here), f"times are those of a table of {named}"
        if not can_measure(subject.target, large=data.large):
            rate = f"{MACS_PER_MS * 1e3:.3g} multiply-accumulates a second"
            return counted_times(subject, batch), (
                f"times are counted by the cost model, {rate} whatever linears hold: "
                f"{_why_not(subject.target)}"
            )

        def measure() -> dict[str, Any]:
            return asdict(measured_times(subject, inputs, self.machine, progress))

        known = Times(**remembered(checkpoints, "times", measure))
        known = replace(known, here=known.machine == self.machine)  # where a resumed run is another
        return known, f"times were measured on this machine ({self.machine}), {known.clock}"


def _why_not(target: Target) -> str:
    if target.name != CPU.name:
        return f"target {target.name} is not timed here; --times FILE takes a table of its machine"
    return "a model of this size takes too much memory to be timed a dozen times over"


def table_of_model(
    view: View, inputs: Mapping[str, torch.Tensor], machine: str, progress: Progress
) -> Times:
    """The table of a canonical graph with all that a search may change in it."""
    structure = recognize(view)
    all_units = units(view, structure)
    subject = Subject(
        view, structure, CPU, (*ROUNDED, *FED_BACK, FAST), PATHS, storable_tables(view, structure),
        all_units, may_go(view, all_units), sites_of(view, structure),
        CUTS if _drops_tokens(view, structure) else (), NARROW,
    )  # fmt: skip
    return measured_times(subject, inputs, machine, progress)


def _drops_tokens(view: View, structure: Structure) -> bool:
    try:
        find_image_tokens(view, structure)
    except Refusal:
        return False
    return True


def check_shapes(table: Times, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise ``BadInput`` where a table was measured on inputs of another shape."""
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items() if tensor.numel()}
    wrong = next((n for n, s in table.inputs.items() if shapes.get(n) != list(s)), None)
    if wrong is not None:
        raise BadInput(
            f"the table of times is of {wrong} {list(table.inputs[wrong])}, and the calibration "
            f"data has {shapes.get(wrong, 'none')}: measure one for that (--length)"
        )


def counted_times(subject: Subject, batch: Mapping[str, torch.Tensor]) -> Times:
    """By the cost model's multiply-accumulates, to which all forms of a linear are alike."""

    def count(views: Sequence[View]) -> list[float]:
        costs = (graph_costs(view, sample_sizes(view, batch)).macs or 0 for view in views)
        return [macs / MACS_PER_MS for macs in costs]

    plain = replace(subject, forms=(), paths=(), tables=())
    return _table(plain, count, lambda *_: None)


def measured_times(
    subject: Subject, inputs: Mapping[str, torch.Tensor], machine: str, progress: Progress
) -> Times:
    """By the clock, on this machine."""
    threads = torch.get_num_threads()
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items() if tensor.numel()}
    table = _table(subject, clock_of(inputs, threads), progress)
    return replace(
        table, inputs=shapes, threads=threads, clock=clock_by(threads).name, machine=machine,
        here=True,
    )  # fmt: skip


def _table(subject: Subject, clock: Clock, progress: Progress) -> Times:
    view = subject.view
    by_size = _by_size(subject) if subject.forms else {}
    (whole,) = clock([view])

    def added(views: Mapping[str, View], count: int = 1) -> dict[str, float]:
        """What each graph adds by one of so many changes, as if the source took ``whole`` again."""
        if not views:
            return {}
        source, *times = clock([view, *views.values()])
        return {
            name: (ms / source - 1) * whole / count for name, ms in zip(views, times, strict=True)
        }

    linears: dict[str, dict[str, float]] = {}
    for number, (size, members) in enumerate(by_size.items()):
        progress(f"timing linears of {size}", number, len(by_size))
        ms = added(dict(_forms(subject, members)), len(members))
        paths = {name: ms[name] - ms[UNDER_PATHS.timed] for name in map(str, _ends(subject.paths))}
        linears[size] = ms | paths
    progress("timing blocks", 0, 1)
    halves: dict[str, float] = {}
    for part in dict.fromkeys(unit.part for unit in subject.may_go):
        count = sum(unit.part == part for unit in subject.units)
        gone = [unit for unit in subject.may_go if unit.part == part][: count - 1]
        if not gone:
            halves[part] = 0.0  # the only one of its kind stays
            continue
        shorter = healed_at_random(view, [unit.name for unit in gone], heal=subject.heal)
        halves[part] = -added({part: shorter}, len(gone))[part]
    shares: dict[str, dict[str, float]] = {}
    for name, alike in _by_signature(subject.sites).items():
        ms = added(dict(_smaller(view, alike)), len(alike))
        shares[name] = {gone: -more for gone, more in ms.items()}
    tables = {str(held): changed(view, held.pass_(subject.target)) for held in subject.tables}
    cuts = {name: whole + ms for name, ms in added(dict(_cuts(subject))).items()}
    caches = added(dict(_caches(subject)))
    return Times(whole, linears, halves, shares, added(tables), cuts, caches)


def _by_size(subject: Subject) -> dict[str, list[Linear]]:
    sizes: dict[str, list[Linear]] = {}
    for linear in subject.structure.linears:
        if reason_against_storing(subject.view, linear) is None:
            sizes.setdefault(signature(linear), []).append(linear)
    return sizes


def _by_signature(sites: Sequence[Site]) -> dict[str, list[Site]]:
    by_name: dict[str, list[Site]] = {}
    for site in sites:
        by_name.setdefault(site.place.signature, []).append(site)
    return by_name


def _smaller(view: View, members: Sequence[Site]) -> Iterator[tuple[str, View]]:
    """The model whose sites of one signature lose each share at once."""
    for what in members[0].options:
        if what.gone:
            losing = [replace(what, sink=site.place.name) for site in members]
            yield str(what.gone), with_the_first(view, losing)


def _forms(subject: Subject, members: Sequence[Linear]) -> Iterator[tuple[str, View]]:
    """The model whose linears of one size hold each form, and each path beside 4 bits."""
    names = [linear.name for linear in members]
    paths = _ends(subject.paths)
    under = (UNDER_PATHS,) if paths else ()
    for name, form in {form.timed: form for form in (*subject.forms, *under)}.items():
        yield name, _stored(subject, form, names)
    for path in paths:
        copy = _stored(subject, UNDER_PATHS, names)
        graft_random(copy, names, path)
        yield str(path), copy


def _ends(paths: Sequence[Path]) -> list[Path]:
    """Of each kind the least rank and the greatest: between them a line is drawn."""
    kinds = dict.fromkeys(path.bits for path in paths if path.rank)
    ends = ([path for path in paths if path.rank and path.bits == bits] for bits in kinds)
    return [path for kind in ends for path in (min(kind), max(kind))]


def _stored(subject: Subject, form: Form, names: Sequence[str]) -> View:
    include = [glob.escape(name) for name in names]
    return changed(subject.view, form.stand_in().pass_(include, subject.target))


def _cuts(subject: Subject) -> Iterator[tuple[str, View]]:
    for cut in subject.cuts:
        with contextlib.suppress(BadInput):
            yield str(Cut(cut)), changed(subject.view, cut)


def _caches(subject: Subject) -> Iterator[tuple[str, View]]:
    for held in subject.caches:
        graph = narrowed(subject.view, held, ())
        if graph is not None:
            yield str(held), graph


def changed(view: View, *passes: Pass) -> View:
    """A copy of a canonical graph behind some passes."""
    copy = view.copy()
    for pass_ in passes:
        pass_.run(Context(copy))
    copy.drop_unused_weights()
    return copy


def graft_random(view: View, names: Sequence[str], path: Path) -> None:
    """Give linears the paths that ``eora`` would, of random numbers."""
    context, random = Context(view), torch.Generator().manual_seed(0)
    by_input: dict[Value, list[Linear]] = {}
    for linear in context.structure.linears:
        if linear.name in names:
            by_input.setdefault(context.wholes[linear.name].input(view), []).append(linear)
    form = FactorForm(path.bits, torch.float16, 4 if path.bits else 0)
    for members in by_input.values():
        factors = [
            (torch.randn(path.rank, x.in_features, generator=random),
             torch.randn(x.out_features, path.rank, generator=random))
            for x in members
        ]  # fmt: skip
        graft_group(context, members, factors, form, "timing")


def stand_in(view: View, choice: Choice, recipe: Callable[[Choice], Recipe]) -> View:
    """A graph that takes as long as the one that a choice makes, by the ``recipe`` that a menu has
    of it, and whose numbers are fitted to nothing."""
    paths: dict[Path, list[str]] = {}
    chosen = dict(choice.chosen)
    losing = []
    for place, option in choice.chosen.items():
        held = option.what
        if isinstance(held, Thinned) and held.gone:
            losing.append(held)
            del chosen[place]
        if isinstance(held, Held) and held.form is not None:
            plain = Held(held.names, held.form.stand_in())
            chosen[place] = replace(option, what=plain)
            if held.path.rank:
                paths.setdefault(held.path, []).extend(held.names)
    copy = with_the_first(view, losing)
    for pass_ in recipe(replace(choice, chosen=chosen)).passes:
        if isinstance(pass_, FollowPath):
            copy = healed_at_random(copy, [*choice.dropped], heal=pass_.heal != "none")
        else:
            copy = changed(copy, pass_)
    for path, names in paths.items():
        graft_random(copy, names, path)
    return copy
