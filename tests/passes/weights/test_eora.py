"""EoRA and its baseline on graphs of both kinds: the closed form, ranks, sharing, refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.run.statistics import Gram
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab import dense_weight
from graphwright.ir.vocab.targets import CPU, CUDA
from graphwright.passes.weights.compensate import Compensate, _chain
from graphwright.passes.weights.factor_form import FactorForm
from graphwright.passes.weights.low_rank import Spectrum, Whitening, allocate, spectrum
from graphwright.passes.weights.quantizers import rtn

from ..calibrated import many, optimize, rel

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]
QUANTIZE = "quantize{bits=2 group=16}"


@pytest.mark.parametrize("recipe", ["eora{rank=2}", "svd-compensate{rank=2}"])
def test_the_gap_of_one_linear_is_in_memory_at_a_time(
    recipe: str, toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps: list[weakref.ref[torch.Tensor]] = []
    original = Compensate.gap

    def watched(pass_: Compensate, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert not [ref for ref in gaps if ref() is not None]
        source, gap = original(pass_, *args)
        gaps.append(weakref.ref(gap))
        return source, gap

    monkeypatch.setattr(Compensate, "gap", watched)
    result = optimize(toy_graph("fx"), f"{QUANTIZE},{recipe}", toy_inputs)
    assert len(gaps) == len(result.report.passes[1].result.sites) == 4, "each is read once"


def test_linears_of_one_input_share_an_eigen_decomposition(
    toy_graph: Graphs, toy_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    original = torch.linalg.eigh

    def watched(matrix: torch.Tensor) -> Any:
        shapes.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    optimize(toy_graph("fx"), f"{QUANTIZE},eora{{rank=2}}", toy_inputs)
    assert shapes == [(32, 32), (40, 40), (32, 32)], "gate and up, down, head"


# --- the formula ----------------------------------------------------------------------------------


def test_the_residual_is_the_tail_of_the_singular_values() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=rng)
    gap = 0.1 * torch.randn(24, 40, generator=rng)
    x = torch.randn(500, 40, generator=rng) @ torch.diag(torch.linspace(0.05, 3, 40))
    gram = x.double().T @ x.double()
    weighted, plain = spectrum(weight, gap, Whitening(gram)), spectrum(weight, gap, None)
    whole = torch.linalg.norm(x @ weight.T)
    for rank in (0, 1, 5, 23, 24):
        down, up = weighted.factors(rank)
        assert (down.shape, up.shape) == ((rank, 40), (24, rank))
        error = float(torch.linalg.norm(x @ (gap - up @ down).T) / whole)
        assert error == pytest.approx(weighted.relative_error(rank), rel=1e-3, abs=1e-6)
        down, up = plain.factors(rank)
        by_weights = float(torch.linalg.norm(x @ (gap - up @ down).T) / whole)
        assert error <= by_weights + 1e-6
    assert weighted.relative_error(24) == 0.0


def test_a_singular_gram_matrix_gives_finite_factors() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=rng)
    x[:, 7] = 0
    whitening = Whitening(x.double().T @ x.double())
    weighted = spectrum(torch.randn(8, 40), torch.randn(8, 40), whitening)
    down, up = weighted.factors(8)
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    assert weighted.relative_error(5) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("size", [120, 320])
def test_a_gram_matrix_summed_in_float32_is_exact_enough(size: int) -> None:
    """Features a thousand times as large as others; what the path leaves of the output's error,
    measured in float64, against one fitted to a Gram matrix in float64: whole, and truncated."""
    rng = torch.Generator().manual_seed(1)
    gap = torch.randn(size - 20, size, generator=rng)
    mix = torch.eye(size) + 0.1 * torch.randn(size, size, generator=rng)
    x = torch.randn(2000, size, generator=rng) @ torch.diag(torch.logspace(-1.5, 1.5, size)) @ mix
    rough, exact = Gram(), Gram()
    rough.see(x)
    exact.see(x.double())
    assert not torch.equal(rough.matrix, exact.matrix)
    errors = []
    for gram in (exact, rough):
        down, up = spectrum(gap, gap, Whitening(gram.matrix), 16).factors(16)
        rest = gap.double() - up.double() @ down.double()
        errors.append(float(torch.linalg.norm(x.double() @ rest.T)))
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_large_factors_are_balanced() -> None:
    rng = torch.Generator().manual_seed(0)
    gram = torch.diag(torch.cat([torch.ones(9), torch.tensor([1e-4])])).double() * 1e-8
    weighted = spectrum(
        torch.randn(8, 10), 1e8 * torch.randn(8, 10, generator=rng), Whitening(gram)
    )
    down, up = weighted.factors(8)
    assert float(down.abs().max()) == pytest.approx(float(up.abs().max()), rel=0.01)


def test_ranks_go_where_they_remove_most_error_for_their_bytes() -> None:
    def spectrum_of(sigma: list[float], energy: float) -> Spectrum:
        k = len(sigma)
        return Spectrum(torch.eye(k), torch.eye(k), torch.tensor(sigma).double(), energy)

    spectra = {"a": spectrum_of([4.0, 3.0, 1.0], 100.0), "b": spectrum_of([2.0, 0.0], 100.0),
               "c": spectrum_of([5.0], 1e9)}  # fmt: skip
    sizes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    assert allocate(spectra, sizes, 20) == {"a": 1, "b": 0, "c": 0}
    assert allocate(spectra, sizes, 59) == {"a": 2, "b": 0, "c": 0}
    assert allocate(spectra, sizes, 60) == {"a": 2, "b": 1, "c": 0}
    assert allocate(spectra, sizes, 10_000) == {"a": 3, "b": 1, "c": 1}, "nothing for a zero"
    assert allocate(spectra, sizes, 10_000, most=1) == {"a": 1, "b": 1, "c": 1}
    wide = {"a": (10, 10), "b": (1, 1), "c": (10, 10)}
    assert allocate(spectra, wide, 21)["b"] == 1, "a cheap rank comes first"


# --- on graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_restores_the_source(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    plain = optimize(source, QUANTIZE, toy_inputs)
    repaired = optimize(source, f"{QUANTIZE},eora{{rank=40 factors=float32}}", toy_inputs)
    before = rel(sweep(source, toy_inputs), sweep(plain.graph, toy_inputs))
    after = rel(sweep(source, toy_inputs), sweep(repaired.graph, toy_inputs))
    assert before > 0.1
    assert after < 1e-4


def test_both_kinds_give_the_same(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    recipe = f"{QUANTIZE},eora{{rank=5}}"
    fx, onnx = (optimize(toy_graph(kind), recipe, toy_inputs) for kind in KINDS)
    by_name = {s.name: s for s in onnx.report.passes[1].result.sites}
    for site in fx.report.passes[1].result.sites:
        other = by_name.pop(site.name)
        assert (site.kind, site.shape) == (other.kind, other.shape)
        assert site.bytes_after == other.bytes_after
        assert site.rel_l2 == pytest.approx(other.rel_l2, rel=1e-3)
    assert not by_name
    assert rel(sweep(fx.graph, toy_inputs), sweep(onnx.graph, toy_inputs)) < 1e-4


@pytest.mark.parametrize("earlier", [QUANTIZE, "easyquant{bits=2 nsig=2}", "hqq{bits=2 group=16}"])
def test_it_beats_the_baseline_that_beats_nothing(
    earlier: str, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    source = toy_graph("fx")
    expected = [sweep(source, batch) for batch in many()]

    def error(recipe: str) -> float:
        graph = optimize(source, recipe, toy_inputs).graph
        outputs = [sweep(graph, batch) for batch in many()]
        join = [torch.cat([b["linear_3"] if "linear_3" in b else next(iter(b.values()))
                           for b in side]) for side in (expected, outputs)]  # fmt: skip
        return float(torch.linalg.norm(join[0] - join[1]) / torch.linalg.norm(join[0]))

    nothing = error(earlier)
    by_weights = error(f"{earlier},svd-compensate{{rank=4}}")
    by_outputs = error(f"{earlier},eora{{rank=4}}")
    assert by_outputs < by_weights < nothing


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_share_one_matmul(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    result = optimize(toy_graph(kind), f"{QUANTIZE},eora{{rank=3}}", toy_inputs)
    factors = [w for n, w in result.graph.weights().items() if ".eora." in n]
    downs, ups = [(3, 32), (3, 40), (6, 32)], [(17, 3), (32, 3), (40, 3), (40, 3)]
    assert sorted(w.shape for w in factors) == downs + ups
    assert {w.dtype for w in factors} == {torch.float16}


@pytest.mark.parametrize("kind", KINDS)
def test_rank_zero_changes_no_bit(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    plain = optimize(toy_graph(kind), QUANTIZE, toy_inputs)
    with pytest.raises(BadInput, match="eora"):
        optimize(toy_graph(kind), f"{QUANTIZE},eora{{rank=0}}", toy_inputs)
    none = optimize(toy_graph(kind), f"{QUANTIZE},eora{{rank=0 optional=true}}", toy_inputs)
    for name, value in sweep(plain.graph, toy_inputs).items():
        assert torch.equal(value, sweep(none.graph, toy_inputs)[name])


def test_a_budget_is_kept_and_predicted(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph("fx")
    recipe = f"{QUANTIZE},eora{{budget=1.5}}"
    step = optimize(source, recipe, toy_inputs).report.passes[1]
    weights = 3 * 32 * 40 + 17 * 32
    spent = step.bytes_after - step.bytes_before
    assert spent == sum(s.bytes_after - s.bytes_before for s in step.result.sites)
    assert 0.8 * 1.5 * weights / 8 < spent <= 1.5 * weights / 8
    planned = gw.plan(source, recipe).passes[1][1].sites
    forecast = sum(s.bytes_after - s.bytes_before for s in planned)
    assert 0.5 * spent < forecast <= 1.5 * weights / 8


def test_a_plan_predicts_the_bytes_of_a_rank(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    recipe = f"{QUANTIZE},eora{{rank=3}}"
    planned = gw.plan(toy_graph("fx"), recipe)
    result = optimize(toy_graph("fx"), recipe, toy_inputs)
    assert planned.artifact_bytes == result.report.passes[-1].bytes_after


def test_statistics_of_the_source_model(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    both = [
        optimize(toy_graph("fx"), f"{QUANTIZE},eora{{rank=4 propagate={mode}}}", toy_inputs)
        for mode in ("dense", "compensated")
    ]
    outputs = [sweep(result.graph, toy_inputs) for result in both]
    assert 1e-6 < rel(*outputs) < 0.2
    source = sweep(toy_graph("fx"), toy_inputs)
    plain = sweep(optimize(toy_graph("fx"), QUANTIZE, toy_inputs).graph, toy_inputs)
    assert all(rel(source, output) < 0.8 * rel(source, plain) for output in outputs)


def test_the_sites_keep_their_names_and_roles(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph("fx")
    result = optimize(source, f"{QUANTIZE},eora{{rank=3}}", toy_inputs)
    canonicalize(source)
    before = {s.name: s.role for s in recognize(source).linears}
    after = {s.name: s.role for s in recognize(result.graph).linears}
    assert after == before


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_to_compensate(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="none before it changes weights: put one in front"):
        optimize(graph, "eora{rank=4}", toy_inputs)
    some = f"{QUANTIZE[:-1]} include=up}},eora{{rank=4}}"
    step = optimize(graph, some, toy_inputs).report.passes[1].result
    assert [s.name for s in step.sites] == ["up"]
    assert {name for name, _ in step.refused} == {"gate", "down", "head"}
    assert "source's own: there is nothing to compensate" in step.refused[0][1]


def test_compensating_twice(graph: View, toy_inputs: Inputs) -> None:
    twice = f"{QUANTIZE},eora{{rank=2 include=up}},svd-compensate{{rank=2}}"
    (refused,) = optimize(graph, twice, toy_inputs).report.passes[2].result.refused
    assert refused == ("up", "a low-rank path compensates it already")


def test_calibration_is_asked_for_early(graph: View, toy_inputs: Inputs) -> None:
    with pytest.raises(BadInput, match="eora needs calibration data"):
        gw.optimize(graph, f"{QUANTIZE},eora{{rank=2}}", samples=[toy_inputs])


@pytest.mark.parametrize(
    ("options", "reason"),
    [("rank=-1", "must not be negative"), ("budget=0", "must be above 0"),
     ("budget=0.0001", "buys no rank")],
)  # fmt: skip
def test_options_out_of_range(
    options: str, reason: str, graph: View, toy_inputs: Inputs
) -> None:
    with pytest.raises(BadInput, match=reason):
        optimize(graph, f"{QUANTIZE},eora{{{options}}}", toy_inputs)


def test_a_rank_above_break_even_is_said(graph: View, toy_inputs: Inputs) -> None:
    """Rank 32 in float16 beside 4-bit codes takes more bytes than float32 weights of 32 x 40."""
    recipe = f"{QUANTIZE},svd-compensate{{rank=32}}"
    (planned,) = [n for n in gw.plan(graph, recipe).passes[1][1].notes if "break-even" in n]
    done = optimize(graph, recipe, toy_inputs).report.passes[1].result
    (note,) = [n for n in done.notes if "break-even" in n]
    for text in (planned, note):
        assert text.startswith("above break-even at ") and "Choose a lower rank" in text
    low = optimize(graph, f"{QUANTIZE},svd-compensate{{rank=3}}", toy_inputs).report.passes[1]
    assert not any("break-even" in n for n in low.result.notes)


# --- factors in few bits --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_factors_in_few_bits(kind: str, toy_graph: Graphs, toy_inputs: Inputs) -> None:
    source = toy_graph(kind)
    expected, errors, sizes = sweep(source, toy_inputs), {}, {}
    for bits in ("", " factor_bits=8", " factor_bits=4"):
        recipe = f"{QUANTIZE},eora{{rank=16{bits}}}"
        repaired = optimize(source, recipe, toy_inputs)
        planned, done = gw.plan(source, recipe).passes[1][1], repaired.report.passes[1].result
        assert [s.bytes_after for s in planned.sites] == [s.bytes_after for s in done.sites]
        computed = sweep(repaired.graph, toy_inputs)
        errors[bits] = rel(expected, computed)
        sizes[bits] = sum(s.bytes_after - s.bytes_before for s in done.sites)
        assert repaired.report.passes[1].bytes_after - repaired.report.passes[1].bytes_before == (
            pytest.approx(sizes[bits], abs=64)
        )
        ran = gw.compile(repaired.graph, backend="onnxruntime")(**toy_inputs)
        assert rel(computed, ran) < 1e-5
    without = rel(expected, sweep(optimize(source, QUANTIZE, toy_inputs).graph, toy_inputs))
    assert errors[""] < errors[" factor_bits=8"] < errors[" factor_bits=4"] < 0.3 * without
    assert sizes[" factor_bits=4"] < sizes[" factor_bits=8"] < sizes[""]


def test_rounded_factors_hold_what_was_measured(toy_graph: Graphs, toy_inputs: Inputs) -> None:
    """What few bits hold they hold again: the graph's factors are those that were compared."""
    for bits in (4, 8):
        form = FactorForm(bits, torch.float16)
        for shape in ((16, 40), (40, 16), (7, 33), (5, 3)):
            once = form.rounded(torch.randn(shape, generator=torch.Generator().manual_seed(bits)))
            assert torch.equal(form.rounded(once), once)
    recipe = f"{QUANTIZE},eora{{rank=8 factor_bits=4}}"
    repaired = optimize(toy_graph("fx"), recipe, toy_inputs)
    source = toy_graph("fx")
    weights = {x.name: source.weight(x.weight) for x in recognize(source).linears}
    structure, measured = {x.name: x for x in recognize(repaired.graph).linears}, []
    for site in repaired.report.passes[1].result.sites:
        weight, linear = weights[site.name], structure[site.name]
        assert weight is not None
        held = dense_weight(repaired.graph, linear.node)
        (side,) = _chain(repaired.graph, linear)
        inner = repaired.graph.producer(repaired.graph.tensor(side))
        if inner is None or repaired.graph.op(inner) == "slice":
            continue  # gate and up share a first factor
        held = held + dense_weight(repaired.graph, side) @ dense_weight(repaired.graph, inner)
        measured.append(site.name)
        gap = (weight.read() - held).norm() / weight.read().norm()
        assert site.rel_l2 == pytest.approx(float(gap), rel=1e-4)
    assert measured == ["down", "head"]


def test_a_small_factor_is_held_by_float16_scales_where_the_other_is_large() -> None:
    draw = torch.Generator().manual_seed(2)
    down, up = torch.randn((8, 64), generator=draw) * 2e-5, torch.randn((40, 8), generator=draw)
    form = FactorForm(4, torch.float16)
    for factors in ((down, up * 1e4), (up.T * 1e4, down.T)):
        even = form.even(*factors)
        assert torch.equal(even[1] @ even[0], factors[1] @ factors[0])
        for before, after in zip(factors, even, strict=True):
            wide, narrow = rtn(before, 4, 16, scale_dtype=torch.float32), rtn(after, 4, 16)
            assert narrow.scales.dtype == torch.float16
            assert (narrow.codes != wide.codes).float().mean() < 0.01
    assert torch.equal(form.even(up.T, up)[0], up.T)


def test_what_float16_scales_do_not_hold_is_counted(graph: View, toy_inputs: Inputs) -> None:
    source = graph.copy()
    for linear in recognize(source).linears:
        weight = source.weight(linear.weight)
        assert weight is not None
        source.set_weight(linear.weight, MemoryWeight(weight.read() * 1e-4))
    step = optimize(source, f"{QUANTIZE},eora{{rank=8 factor_bits=4}}", toy_inputs).report.passes[1]
    planned = gw.plan(source, f"{QUANTIZE},eora{{rank=8 factor_bits=4}}").passes[1][1].sites
    sizes = [site.bytes_after - site.bytes_before for site in step.result.sites]
    assert sum(sizes) == step.bytes_after - step.bytes_before
    assert sum(sizes) > sum(site.bytes_after - site.bytes_before for site in planned)


def test_factors_multiply_as_the_target_likes(graph: View, toy_inputs: Inputs) -> None:
    text = "quantize{bits=4 group=16},eora{rank=8 factor_bits=8}"
    settled = str(gw.Recipe.parse(text).settled(CPU))
    assert settled.endswith("eora{rank=8 factor_bits=8 accuracy_level=4}")
    assert "accuracy_level" not in str(gw.Recipe.parse(text).settled(CUDA)).split("eora")[1]
    repaired = optimize(graph, settled, toy_inputs).graph
    linears = [n for n in repaired.nodes() if repaired.op(n) == "linear_nbit"]
    assert {repaired.attrs(node)["accuracy_level"] for node in linears} == {4}
    ran = gw.compile(repaired, backend="onnxruntime")(**toy_inputs)
    assert rel(sweep(repaired, toy_inputs), ran) < 1e-2  # a rounding may fall to the other side
    with pytest.raises(BadInput, match="accuracy_level= is for factors of few bits"):
        gw.Recipe.parse("eora{accuracy_level=4}")


def test_factors_in_few_bits_under_a_budget(graph: View, toy_inputs: Inputs) -> None:
    recipe = f"{QUANTIZE},eora{{budget=4 factor_bits=4}}"
    sites = optimize(graph, recipe, toy_inputs).report.passes[1].result.sites
    spent = sum(8 * (s.bytes_after - s.bytes_before) for s in sites)
    assert 0.7 * 4 <= spent / sum(s.shape[0] * s.shape[1] for s in sites) <= 1.5 * 4


def test_a_path_of_few_bits_is_seen(graph: View, toy_inputs: Inputs) -> None:
    recipe = f"{QUANTIZE},eora{{factor_bits=4 rank=8 include=[up]}},eora{{rank=2}}"
    result = optimize(graph, recipe, toy_inputs).report.passes[2].result
    assert ("up", "a low-rank path compensates it already") in result.refused
