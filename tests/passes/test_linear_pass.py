"""What the base gives a weight method: statistics, a shared sweep, resuming, tied linears.

The methods here are those of a package outside: one function each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight, Weight
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run import calibrate, sweep
from graphwright.ir.run.statistics import STATISTICS, Square, Stat, Statistic, Statistics, register
from graphwright.ir.structure.recognize import Linear, recognize
from graphwright.passes.base import CHANGED, Context, Needs, Pass, PassResult, Propagate
from graphwright.passes.learning import Learning
from graphwright.passes.linear_pass import StoringPass
from graphwright.passes.manager import optimize
from graphwright.passes.registry import pass_class
from graphwright.passes.stored import Stored, numbers
from graphwright.passes.weights import bitstack, eora
from torch import Tensor

from .calibrated import many

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Scaled(StoringPass):
    """Multiply each weight by ``factor``, and keep the mean square of its inputs."""

    name: ClassVar[str] = "scaled"
    needs: ClassVar[Needs] = Needs(stats=(Stat("square", at="linear"),))
    provides: ClassVar[tuple[str, ...]] = (CHANGED,)
    excludes: ClassVar[tuple[str, ...]] = ()
    keeps_form: ClassVar[bool] = True
    factor: float = 0.5
    propagate: Propagate = "dense"
    log: ClassVar[dict[str, tuple[int, float]]] = {}

    def requires(self) -> Needs:
        return replace(self.needs, propagate=self.propagate)

    def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
        square = statistics[Square]
        self.log[name] = square.count, float(square.total.mean()) / square.count
        return numbers(weight * self.factor, weight)

    def predicted_bytes(self, linear: Linear, weight: Weight) -> int:
        return weight.nbytes


@dataclass(frozen=True, kw_only=True)
class Again(Scaled):
    name: ClassVar[str] = "again"
    log: ClassVar[dict[str, tuple[int, float]]] = {}


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many batches each sweep for statistics took."""
    taken: list[int] = []
    whole = sweep.sweep_together

    def counted(view: View, batches: Any, *args: Any, **options: Any) -> Any:
        taken.append(len(batches))
        return whole(view, batches, *args, **options)

    monkeypatch.setattr(calibrate, "sweep_together", counted)
    Scaled.log.clear()
    Again.log.clear()
    yield taken


def run(graph: View, passes: Any, inputs: Inputs, **options: Any) -> Any:
    return optimize(graph, passes, samples=[inputs], calibration=many(), **options)


# --- propagation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dense_statistics_do_not_see_what_is_stored(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    source = toy_graph(kind)
    run(source, Scaled(), toy_inputs)
    dense = dict(Scaled.log)
    run(source, Scaled(propagate="sequential"), toy_inputs)
    sequential = dict(Scaled.log)
    run(source, Scaled(propagate="current"), toy_inputs)
    assert Scaled.log == dense, "before the first change the graph is dense"
    assert sequential["gate"] == dense["gate"] and sequential["up"] == dense["up"]
    assert sequential["down"][1] < 0.3 * dense["down"][1], "gate and up are halved"
    assert sequential["head"][1] != pytest.approx(dense["head"][1])
    assert sweeps == [4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_sees_what_the_finished_graph_computes(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    result = run(toy_graph(kind), Scaled(propagate="sequential"), toy_inputs)
    on_the_way = dict(Scaled.log)
    run(result.graph, Scaled(propagate="current", factor=1.0), toy_inputs)
    for name, (count, square) in Scaled.log.items():
        assert on_the_way[name][0] == count
        assert on_the_way[name][1] == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("name", ["quantize", "easyquant"])
def test_sequential_sees_every_stored_form(
    name: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    """Codes, and outliers beside them."""
    log: dict[str, float] = {}
    method: Any = pass_class(name)

    @dataclass(frozen=True, kw_only=True)
    class Sequential(method):  # type: ignore[misc]
        needs: ClassVar[Needs] = Needs(stats=Scaled.needs.stats, propagate="sequential")

        def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
            log[name] = float(statistics[Square].total.mean())
            stored: Stored = super().fit(weight, statistics, name)
            assert bool(stored.outliers) == (self.name == "easyquant")
            return stored

    options = {"nsig": 1.5} if name == "easyquant" else {}
    result = run(toy_graph("fx"), Sequential(bits=2, group=16, **options), toy_inputs)
    squares: dict[str, float] = {}

    def done(site: str, statistics: Statistics) -> None:
        squares[site] = float(statistics[Square].total.mean())

    requests = [
        calibrate.Request(x.name, ((x.x,),), Scaled.needs.stats, partial(done, x.name))
        for x in recognize(result.graph).linears
    ]
    calibrate.calibrate(result.graph, many(), requests)
    assert squares.keys() == log.keys() == {"gate", "up", "down", "head"}
    for site, square in squares.items():
        assert log[site] == pytest.approx(square, rel=1e-5)


def test_bitstack_sees_the_graph_as_it_is(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, squares = toy_graph("fx"), []
    whole = bitstack.input_scale

    def noting(total: Tensor, count: int) -> Tensor:
        squares.append(float(total.mean()) / count)
        return whole(total, count)

    monkeypatch.setattr(bitstack, "input_scale", noting)
    passes = [Scaled(exclude=("down", "head")), bitstack.BitStack(blocks=1, include=("down",))]
    run(graph, passes, toy_inputs)
    run(graph, Scaled(), toy_inputs)
    assert len(squares) == 1 and squares[0] < 0.3 * Scaled.log["down"][1], "gate and up are halved"


# --- one sweep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_see_one_graph_share_a_sweep(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    run(toy_graph(kind), [Scaled(), Again()], toy_inputs)
    assert sweeps == [4]
    assert Again.log == Scaled.log, "the second sees no change that the first made"
    assert len(Again.log) == 4


def test_others_do_not(toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]) -> None:
    graph = toy_graph("fx")
    run(graph, [Scaled(), Again(propagate="current")], toy_inputs)
    assert sweeps == [4, 4]
    assert Again.log["down"][1] < 0.3 * Scaled.log["down"][1]


def test_dense_behind_a_pass_without_statistics(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    graph = toy_graph("fx")
    run(graph, Scaled(), toy_inputs)
    expected = dict(Scaled.log)
    halved = gw.Recipe.parse("magnitude").passes[0]
    run(graph, [halved, Scaled()], toy_inputs)
    assert Scaled.log == expected, "of the graph before its weights were changed"
    assert sweeps == [4, 4]


def test_eora_and_bitstack_share_one(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    eora = "eora{rank=3 propagate=dense}"
    alone = run(toy_graph("fx"), f"quantize{{bits=2 group=16}},{eora}", toy_inputs)
    sites = {s.name: s.note for s in alone.report.passes[1].result.sites}
    sweeps.clear()
    both = run(toy_graph("fx"), f"bitstack{{blocks=1}},{eora}", toy_inputs)
    assert sweeps == [4]
    assert {s.name: s.note for s in both.report.passes[1].result.sites} == sites


def test_what_was_put_away_is_read_once_for_all_linears_of_one_input(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And serves both looks of a pass with a budget; nothing is kept for passes that have run."""
    grams, passes = [], []
    whole = eora.Whitening

    def counted(gram: Tensor) -> Any:
        grams.append(gram)
        return whole(gram)

    monkeypatch.setattr(eora, "Whitening", counted)
    before = Learning.before
    monkeypatch.setattr(
        Learning, "before", lambda self, context: passes.append(self) or before(self, context)
    )
    run(toy_graph("fx"), "bitstack{blocks=1},eora{budget=1.5 propagate=dense},clean{optional=true}",
        toy_inputs)  # fmt: skip
    assert sweeps == [4]
    assert len(grams) == 2 * 3, "gate and up, down, head; for the spectra and for the paths"
    assert passes[-1]._put_away == {}


def test_nothing_is_gathered_for_linears_that_a_later_pass_will_refuse(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[str] = []
    whole = calibrate.calibrate

    def noting(view: View, batches: Any, requests: Any, *rest: Any) -> None:
        gathered.extend(r.site for r in requests if r.stats[0].name == "gram")
        whole(view, batches, requests, *rest)

    monkeypatch.setattr("graphwright.passes.learning.calibrate", noting)
    changing = "bitstack{blocks=1 include=down},quantize{bits=2 group=16 include=head}"
    run(toy_graph("fx"), f"{changing},eora{{rank=3 propagate=dense}}", toy_inputs)
    assert sorted(gathered) == ["down", "head"] and sweeps == [4]


def test_dense_is_before_any_pass_that_changes_weights(
    toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Halves(Pass):
        """Of no family of ours, but says that it changes weights."""

        name: ClassVar[str] = "halves"
        exact: ClassVar[bool] = False
        provides: ClassVar[tuple[str, ...]] = (CHANGED,)

        def run(self, context: Context) -> PassResult:
            for linear in context.structure.linears:
                weight = context.view.weight(linear.weight)
                assert weight is not None
                context.view.set_weight(linear.weight, MemoryWeight(weight.read() / 2))
            return PassResult(edits=1)

        def plan(self, context: Context) -> PassResult:
            return PassResult(edits=1)

    run(toy_graph("fx"), Scaled(), toy_inputs)
    expected = dict(Scaled.log)
    run(toy_graph("fx"), [Halves(), Scaled()], toy_inputs)
    assert Scaled.log == expected


# --- tied linears --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_fitted_once_to_all_its_inputs(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    def stack(toy: Any) -> None:
        first, second = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
        toy.down = torch.nn.Sequential(first, torch.nn.SiLU(), second, toy.down)

    graph = toy_graph(kind, stack)
    canonicalize(graph)
    linears = {x.name: x for x in recognize(graph).linears}
    shared = graph.weight(linears["down.0"].weight)
    assert shared is not None
    graph.set_weight(linears["down.2"].weight, shared)
    run(graph, Scaled(), toy_inputs)
    tokens = sum(batch["ids"].numel() for batch in many())
    counts = {name: count for name, (count, _) in Scaled.log.items()}
    assert counts == {**dict.fromkeys(("gate", "up", "down.3", "head"), tokens),
                      "down.0": 2 * tokens}  # fmt: skip


# --- resuming ------------------------------------------------------------------------------------


class Kept(dict[str, Any]):
    """A memory that stops taking anything in after so many results, as a killed run does."""

    most = 10_000

    def recall(self, key: str) -> Any:
        return self[key]

    def keep(self, key: str, result: Any) -> None:
        if len(self) >= self.most:
            raise KeyboardInterrupt
        self[key] = result


RESUMED = [
    "quantize{bits=2 group=16},eora{rank=3}", "aqlm{bits=1 rounds=1}",
    "quantize{bits=2 group=16},eora{budget=1.5 factor_bits=8}", "w8a8{activations=static}",
    "bitstack{blocks=2},eora{rank=3 propagate=dense}", "gptq{bits=2 group=16},eora{rank=3}",
    "sparsegpt,dsnot,eora{rank=3}", "low-rank{whiten=gram rank=8},eora{rank=3}",
    "sparse-plus-low-rank{rank=3}", "smooth,awq{bits=2 group=16}",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RESUMED)
def test_a_killed_run_goes_on_to_the_same_bytes(
    recipe: str, toy_graph: Graphs, toy_inputs: Inputs, sweeps: list[int]
) -> None:
    def stored(result: Any) -> dict[str, Tensor]:
        return {name: weight.read() for name, weight in result.graph.weights().items()}

    source, whole = toy_graph("fx"), Kept()
    expected = stored(run(source, recipe, toy_inputs, checkpoints=whole))
    once = list(sweeps)
    for most in range(3, len(whole), 4):
        memory = Kept()
        memory.most = most
        with pytest.raises(KeyboardInterrupt):
            run(source, recipe, toy_inputs, checkpoints=memory)
        memory.most = 10_000
        resumed = stored(run(source, recipe, toy_inputs, checkpoints=memory))
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[name], expected[name]) for name in resumed)
    sweeps.clear()
    run(source, recipe, toy_inputs, checkpoints=whole)
    assert once and not sweeps, "what was swept is not swept again"


# --- from outside --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_of_another_package(
    kind: str, toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphwright.ir.run.statistics.STATISTICS", dict(STATISTICS))

    @register
    class Least(Statistic):
        name = "least"
        at = "linear"

        def __init__(self) -> None:
            self.least = torch.tensor(torch.inf)

        def add(self, *parts: Tensor) -> None:
            self.least = torch.minimum(self.least, parts[0].min())

    learned: dict[str, float] = {}

    @dataclass(frozen=True, kw_only=True)
    class Shifted(Scaled):
        needs: ClassVar[Needs] = Needs(stats=(Stat("least", at="linear"),))

        def fit(self, weight: Tensor, statistics: Statistics, name: str) -> Stored:
            learned[name] = float(statistics[Least].least)
            return numbers(weight + 1e-3, weight)

    result = run(toy_graph(kind), [Shifted()], toy_inputs)
    assert learned.keys() == {"gate", "up", "down", "head"}
    assert learned["gate"] == learned["up"] != learned["down"]
    assert len(result.report.passes[0].result.sites) == 4


# --- refusals ------------------------------------------------------------------------------------


def test_data_is_asked_for_before_any_work(graph: View, toy_inputs: Inputs) -> None:
    for recipe in ("drop-blocks", "bitstack", "quantize,eora"):
        with pytest.raises(BadInput, match="needs calibration data: give --calib"):
            gw.optimize(graph, recipe, samples=[toy_inputs])


def test_one_statistic_of_a_kind() -> None:
    with pytest.raises(TypeError, match="one statistic of a kind"):
        Needs(stats=(Stat("square", at="linear"), Stat("square", at="linear")))


def test_a_site_that_the_dense_graph_lacks(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Renamed(Pass):
        """Give a linear a weight, and so a site, of another name."""

        name: ClassVar[str] = "renamed"
        exact: ClassVar[bool] = True

        def run(self, context: Context) -> PassResult:
            (up,) = (x for x in context.structure.linears if x.name == "up")
            weight = context.view.weight(up.weight)
            assert weight is not None
            copied = context.view.add_weight("upper.weight", MemoryWeight(weight.read().clone()))
            context.view.set_operand(up.node, 1, copied)
            context.edited()
            return PassResult(edits=1)

        def plan(self, context: Context) -> PassResult:
            return PassResult(edits=1)

    passes = [Scaled(propagate="current"), Renamed(), Again()]
    with pytest.raises(BadInput, match=r"square matches no site: .*\(dense\) has no linear upper"):
        run(toy_graph("fx"), passes, toy_inputs)


# --- what is not a plain linear -------------------------------------------------------------------


class Odd(torch.nn.Module):
    """A weight stored narrow, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.up = torch.nn.Linear(32, 32, bias=False).half()
        self.experts = torch.nn.Parameter(torch.randn(2, 32, 32, generator=draw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x @ self.experts, self.up.weight.float())


@pytest.fixture(params=KINDS)
def odd(request: pytest.FixtureRequest) -> View:
    graph = trace(Odd().eval(), (torch.randn(3, 32),))
    return graph if request.param == "fx" else translated(graph)


def test_a_weight_stored_narrow_is_a_site(odd: View) -> None:
    for recipe, after in (("quantize{bits=8 group=0}", 32 * 32 + 2 * 32), ("magnitude", 2048)):
        result = optimize(odd, recipe)
        (site,) = result.report.passes[0].result.sites
        assert (site.name, site.bytes_before, site.bytes_after) == ("up", 2048, after)
    assert odd.weights().keys() == result.graph.weights().keys()
    assert {w.dtype for w in result.graph.weights().values()} == {torch.float16, torch.float32}


def test_products_that_are_no_linears_are_refused(odd: View) -> None:
    for options, listed in (("", True), ("include=up", False), ("min_size=4096", False)):
        recipe = f"quantize{{bits=8 optional=true {options}}}"
        refused = optimize(odd, recipe).report.passes[0].result.refused
        assert [site for site, _ in refused] == (["experts"] if listed else [])
        assert all(why.startswith("w is a stack of 2 matrices") for _, why in refused)
