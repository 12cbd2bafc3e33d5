"""Heads and units that go: scores, what they leave behind, sizes, what is composed and refused."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.dormant_heads import awake, first_token_shares
from graphwright.passes.weights.flap import regressed, score_of

from ... import models as small_models
from ..calibrated import rel

KINDS = ("fx", "onnx")
Inputs = dict[str, torch.Tensor]


def texts(count: int = 6) -> list[Inputs]:
    rng = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, small_models.VOCAB, (4, 9), generator=rng)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def run(source: View, recipe: str, inputs: Inputs, **options: Any) -> Any:
    return gw.optimize(source, recipe, samples=[inputs], calibration=texts(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_flap_takes_the_share_that_was_asked(
    kind: str, llama: tuple[Any, dict[str, View]]
) -> None:
    small, views = llama
    expected = sweep(views[kind], small.inputs)
    errors = {}
    for repair in ("none", "bias", "regression"):
        smaller = run(views[kind], f"flap{{ratio=0.3 repair={repair}}}", small.inputs)
        step = smaller.report.passes[0]
        assert step.macs_after < step.macs_before
        sizes = [(s.bytes_before, s.bytes_after) for s in step.result.sites]
        linears = [x for x in recognize(views[kind]).linears if x.role != "head"]
        whole = sum(x.out_features * x.in_features * 4 for x in linears)
        gone = sum(before - after for before, after in sizes) / whole
        assert gone == pytest.approx(0.3, abs=0.03)
        assert f"{gone:.1%} of the weights" in step.result.notes[0]
        after = {
            x.name: x.out_features * x.in_features * 4 for x in recognize(smaller.graph).linears
        }
        for site in step.result.sites:
            assert after[site.name] == site.bytes_after
        errors[repair] = rel(expected, sweep(smaller.graph, small.inputs))
    assert len({round(error, 6) for error in errors.values()}) == 3
    ran = gw.compile(smaller.graph, backend="onnxruntime")(**small.inputs)
    assert rel(sweep(smaller.graph, small.inputs), ran) < 1e-5


def test_the_scores_of_flap() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=rng).double() * torch.arange(1, 7) + torch.arange(6)
    weight = torch.randn(4, 6, generator=rng).double()
    fluctuation = (x - x.mean(0)).square().mean(0)
    expected = {
        "wifv": fluctuation * weight.norm(dim=0) ** 2,
        "ifv": fluctuation,
        "wifn": (weight.abs() * x.norm(dim=0) / 50**0.5).mean(0),
    }
    for score, by_input in expected.items():
        torch.testing.assert_close(
            score_of(score, weight, x.mean(0), x.square().mean(0)), by_input
        )


def test_flap_takes_the_share_of_each_place(llama: tuple[Any, dict[str, View]]) -> None:
    small, views = llama
    recipe = "flap{ratio=0.25 score=wifn across=place parts=[units]}"
    sites = run(views["fx"], recipe, small.inputs).report.passes[0].result.sites
    assert {site.note for site in sites} == {"42 of 56 units stay"}


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_do_not_vary_go_without_a_trace(
    kind: str, llama: tuple[Any, dict[str, View]]
) -> None:
    """``down`` reads 0 of a unit whose ``up`` is 0: its variance is 0, and so is its mean."""
    small, views = llama
    view = views[kind].copy()
    for linear in recognize(view).linears:
        if linear.role == "up":
            held = view.weight(linear.weight)
            assert held is not None
            weight = held.read().clone()
            weight[::4] = 0
            view.set_weight(linear.weight, MemoryWeight(weight))
    smaller = run(view, "flap{ratio=0.25 parts=[units]}", small.inputs)
    assert {site.note for site in smaller.report.passes[0].result.sites} == {"42 of 56 units stay"}
    assert rel(sweep(view, small.inputs), sweep(smaller.graph, small.inputs)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_behind_compensates_the_gap_to_the_smaller_model(
    kind: str, llama: tuple[Any, dict[str, View]]
) -> None:
    small, views = llama
    flap = "flap{ratio=0.3}"
    smaller = sweep(run(views[kind], flap, small.inputs).graph, small.inputs)
    whole = f"{flap},quantize{{bits=2 group=16}},eora{{rank=64 factors=float32}}"
    repaired = run(views[kind], whole, small.inputs)
    assert rel(smaller, sweep(repaired.graph, small.inputs)) < 1e-4


def test_the_mean_stays_and_what_is_left_is_its_covariance() -> None:
    """The card's identity: the expected squared error is ``tr(W_R C_RR W_R^T)``; and regression
    leaves no more than that."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 24, generator=rng) @ torch.randn(24, 24, generator=rng) + 1
    x, weight = x.double(), torch.randn(8, 24, generator=rng).double()
    gone = torch.zeros(24, dtype=torch.bool)
    gone[[1, 5, 6, 20]] = True
    stays, mean = torch.nonzero(~gone)[:, 0], x.mean(0)
    residual = x @ weight.T - (x[:, stays] @ weight[:, stays].T + weight[:, gone] @ mean[gone])
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    trace = torch.trace(weight[:, gone] @ covariance[gone][:, gone] @ weight[:, gone].T)
    assert float(residual.square().sum(1).mean()) == pytest.approx(float(trace), rel=1e-9)
    fitted = regressed(weight, x.T @ x / len(x), mean, stays, gone)
    rest = x @ weight.T - (x[:, stays] @ fitted.T + weight @ mean - fitted @ mean[stays])
    assert float(rest.square().sum(1).mean()) < 0.9 * float(trace)


def test_the_forecast(llama: tuple[Any, dict[str, View]], no_reads: Any) -> None:
    small, views = llama
    sinks = [x.name for x in recognize(views["fx"]).linears if x.role in ("o", "down")]
    recipe = f"flap{{ratio=0.25 across=place include=[{sinks[0]} {sinks[-1]}]}}"
    with no_reads():
        planned = gw.plan(views["fx"], recipe).passes[0][1]
    done = run(views["fx"], recipe, small.inputs).report.passes[0].result
    assert {s.name: s.bytes_after for s in planned.sites} == {
        s.name: s.bytes_after for s in done.sites
    }
    assert {s.note for s in done.sites} == {"1 of 2 heads of keys stay", "42 of 56 units stay"}
    assert len(done.sites) == 7 and {sinks[0], sinks[-1]} < {s.name for s in done.sites}
    assert "decided by the calibration data" in planned.notes[0]


# --- dormant heads -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_to_the_first_token(
    kind: str, llama: tuple[Any, dict[str, View]]
) -> None:
    """Against the model's own attention weights."""
    small, views = llama
    view = views[kind]
    nodes = {site.node: site.o for site in recognize(view).attentions}
    batches = texts(2)
    shares = list(first_token_shares(view, batches, nodes).values())
    model = small.module.model
    model.set_attn_implementation("eager")
    totals, count = [torch.zeros(4) for _ in shares], 0
    with torch.no_grad():
        for batch in batches:
            attentions = model(**batch, output_attentions=True).attentions
            counted = batch["attention_mask"].clone()
            counted[:, 0] = 0  # it sees itself alone
            count += int(counted.sum())
            for total, weights in zip(totals, attentions, strict=True):
                total += (weights[..., 0] * counted[:, None]).sum((0, 2))
    for share, total in zip(shares, totals, strict=True):
        torch.testing.assert_close(share.float(), total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dormant_heads_go_without_a_trace(
    kind: str, llama: tuple[Any, dict[str, View]]
) -> None:
    """The heads that look at the first token most, whose values are made 0."""
    small, views = llama
    view = views[kind].copy()
    sites = recognize(view).attentions
    shares = first_token_shares(view, texts(), {a.node: a.o for a in sites})
    least = {node: share.reshape(2, 2).amin(1) for node, share in shares.items()}
    site = max(sites, key=lambda a: float(least[a.node].max()))
    group = int(least[site.node].argmax())
    (linear,) = (x for x in recognize(view).linears if x.name == site.v)
    held = view.weight(linear.weight)
    assert held is not None
    weight = held.read().clone()
    weight[group * 8 : group * 8 + 8] = 0
    view.set_weight(linear.weight, MemoryWeight(weight))
    threshold = float(least[site.node].max()) - 1e-4
    smaller = run(view, f"dormant-heads{{threshold={threshold}}}", small.inputs)
    result = smaller.report.passes[0].result
    assert {x.name for x in result.sites} == {site.q, site.k, site.v, site.o}
    assert {x.note for x in result.sites} == {"1 of 2 heads of keys stay"}
    (refused,) = result.refused
    assert "its heads attend elsewhere: one gives the first token" in refused[1]
    assert {(a.heads, a.kv_heads) for a in recognize(smaller.graph).attentions} == {(2, 1), (4, 2)}
    assert rel(sweep(view, small.inputs), sweep(smaller.graph, small.inputs)) < 2e-6


def test_which_heads_are_awake() -> None:
    shares = torch.tensor([0.99, 0.5, 0.98, 0.97, 0.2, 0.1])
    assert awake(shares, 3, 0.95) == [0, 2], "one of two queries is awake"
    assert awake(shares, 6, 0.95) == [1, 4, 5]
    assert awake(torch.tensor([0.99, 0.97, 0.98]), 3, 0.9) == [1], "one stays"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("flap{ratio=0}", "ratio=0.0 must be above 0 and below 1"),
        ("flap{parts=[layers]}", "parts=layers are heads, units or both"),
        ("flap{include=[*.dawn]}", r"include=\*\.dawn matches no site"),
        ("dormant-heads{threshold=2}", "threshold=2.0 is a share of attention"),
        ("dormant-heads{threshold=1}", "found nothing to do .*its heads attend elsewhere"),
        ("quantize,flap", "is stored in another form already: put this pass first"),
    ],
)
def test_what_cannot_be(
    recipe: str, reason: str, llama: tuple[Any, dict[str, View]]
) -> None:
    small, views = llama
    with pytest.raises(BadInput, match=reason):
        run(views["fx"], recipe, small.inputs)
