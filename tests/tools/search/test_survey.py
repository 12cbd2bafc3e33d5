"""What a search forecasts by: how much the loss minds an error, and what errors forms make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.run.calibrate import Request, calibrate
from graphwright.ir.run.statistics import Gram, Stat, Statistics
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import Linear, recognize
from graphwright.ir.vocab.targets import find_target
from graphwright.passes.linear_pass import weight_of
from graphwright.passes.weights.low_rank import Whitening, spectrum
from graphwright.tools.search.data import parts
from graphwright.tools.search.forms import NO_PATH, Form
from graphwright.tools.search.forms import Path as SidePath
from graphwright.tools.search.judge import Judge
from graphwright.tools.search.measure import measured
from graphwright.tools.search.menu import Menu
from graphwright.tools.search.probe import Gap, sensitivities, spread_over_blocks
from graphwright.tools.search.problem import KEPT
from graphwright.tools.search.survey import dense, left_by_rank, stored, survey
from graphwright.tools.search.wholes import linears_of

from tests.models import albert, plain

from .conftest import Batches, silent

TARGET = find_target("cpu")


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_the_loss_is_the_divergence_of_the_next_words(
    views: dict[str, View], batches: Batches, kind: str
) -> None:
    view = views[kind]
    judge = Judge(view, recognize(view), batches[:1])
    assert judge.of(view).value == pytest.approx(0, abs=1e-6)
    site = next(x for x in recognize(view).linears if x.role == "down")
    moved = view.copy()
    at = next(x for x in recognize(moved).linears if x.name == site.name)
    weight = weight_of(moved, at)
    moved.set_weight(at.weight, MemoryWeight(weight.read() * 1.3))
    mask = batches[0]["attention_mask"].bool()
    p, q = (sweep(v, batches[0])[judge.output][mask].log_softmax(-1) for v in (view, moved))
    gap = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    loss = judge.of(moved)
    assert judge.additive(loss.value) == pytest.approx(float(gap.mean()), rel=1e-3)
    assert loss.low < loss.value < loss.high

    def less(_: Any) -> dict[str, Gap]:
        gap = -0.3 * weight.read().float()
        return {"scaled": Gap(gap, gap[:2]), "nothing": Gap(0 * gap, gap[:0])}

    minded, met = (found[site.name] for found in sensitivities(view, judge, [site], less, silent))
    changes: list[torch.Tensor] = []

    def visit(node: Any, operands: Any, results: Any) -> None:
        if node is site.node:
            changes.append(0.3 * (results[0] - (0 if site.bias is None else operands[-1])))

    sweep(view, batches[0], observe=visit)
    energy = float(changes[0][mask].square().sum()) / int(mask.sum())
    assert minded["scaled"] * energy == pytest.approx(float(gap.mean()), rel=1e-3)
    rows = changes[0][mask].square().sum(0)[:2] / int(mask.sum())
    assert met["scaled"] == pytest.approx([energy, *rows.tolist()], rel=1e-4)
    assert minded["nothing"] == 0 and met["nothing"] == [0]


def test_errors_are_those_of_the_outputs_and_of_their_singular_values(
    views: dict[str, View], batches: Batches
) -> None:
    view = views["fx"]
    site = next(x for x in recognize(view).linears if x.role == "up")
    forms = (Form("quantize", 3, 32), Form("gptq", 3, 32), Form("quantize", 8, 64))
    errors = survey(view, batches, [[site]], forms, TARGET, silent, ranks=True, sampled=False)[
        site.name
    ]
    by_rows = survey(view, batches, [[site]], forms[:1], TARGET, silent, ranks=False, sampled=True)
    assert by_rows[site.name].of(forms[0], NO_PATH) == pytest.approx(
        errors.of(forms[0], NO_PATH), rel=1e-4
    )
    known: list[Statistics] = []
    place = ((view.tensor(site.node),),)
    stats = (Stat("gram", at="linear"),)
    calibrate(view, batches, [Request(site.name, place, stats, known.append)])
    (statistics,) = known
    gram = statistics[Gram]
    weight = weight_of(view, site).read()
    for form in forms[:2]:
        gap = (weight - dense(stored(form, weight, statistics, site, TARGET))).double()
        energy = float(((gap @ gram.matrix) * gap).sum()) / gram.count
        assert errors.of(form, NO_PATH) == pytest.approx(energy, rel=1e-4)
        assert torch.equal(errors.gaps[form.method].whole, gap.half())
    assert errors.of(forms[1], NO_PATH) < errors.of(forms[0], NO_PATH)
    # On other rows, by method: 8 bits round as 3 do, and the inputs' errors grow as rounding's do.
    own = errors.by_form[forms[0]]
    drift = errors.drifts({"quantize": [3 * own, *([own / 8] * 64)], "gptq": [7 * own]})
    other = replace(errors, drift=drift)
    ratios = [other.of(form, NO_PATH) / errors.of(form, NO_PATH) for form in forms]
    assert ratios == pytest.approx([3, 7 * own / errors.by_form[forms[1]], 3])
    left = 1 - 16 / 8 / 3
    assert other.of(forms[0], SidePath(16)) == pytest.approx(3 * own * left)
    assert errors.drifts({}) == {}
    whitening = Whitening(gram.matrix)
    gap = weight - dense(stored(forms[0], weight, statistics, site, TARGET))
    for matrix in (gap, gap[:20]):
        sigma = torch.linalg.svdvals(whitening.apply(matrix)).square()
        shares, directions = left_by_rank(matrix, whitening)
        assert float(shares[4]) == pytest.approx(float(sigma[4:].sum() / sigma.sum()), rel=1e-6)
        exact = spectrum(matrix, matrix, whitening).left[:, :4].T @ matrix.double()
        for rows in (exact, directions[:4]):  # up to their signs
            rows /= rows.norm()
        assert torch.allclose(exact.T @ exact, directions[:4].T @ directions[:4], atol=1e-7)
    assert errors.of(forms[0], SidePath(4)) < errors.of(forms[0], SidePath(4, 4))
    # Of 8 bits that is half of the error, and stays beside any path.
    rounds = forms[2]
    held = stored(rounds, weight, statistics, site, TARGET)
    change = [held.outputs(x, None) - x.float() @ weight.T for x in inputs_of(view, site, batches)]
    energy = float(torch.cat(change).square().sum()) / statistics[Gram].count
    assert errors.of(rounds, NO_PATH) == pytest.approx(energy, rel=0.15)
    assert errors.by_inputs[rounds] == pytest.approx(errors.of(rounds, NO_PATH) / 2, rel=0.15)
    assert errors.by_inputs[rounds] < errors.of(rounds, SidePath(4)) < errors.of(rounds, NO_PATH)


def test_linears_that_share_a_weight_are_asked_about_together(batches: Batches) -> None:
    """Of several uses the loss is that of all; and no half of a block may go, with which but one of
    them would."""
    view = plain(albert()).copy()
    canonicalize(view)
    data, structure = parts(view, batches), recognize(view)
    judge = Judge(view, structure, data.judge)
    menu = Menu.of(view, data, judge, TARGET, ("layers", "bits"), silent)
    assert not menu.problems[0].units
    assert menu.notes[0].startswith("6 of 6 halves of blocks stay: linears share their weights")
    (problem,) = menu.problems
    kept = {p.name: next(o for o in p.options if o.kind == KEPT) for p in problem.places}
    shared = [p for p in problem.places if len(linears_of(p)) == 3]
    assert len(shared) == 6
    for place in shared:
        three = next(o for o in place.options if o.kind == "3 bits")
        choice = problem.choice({**kept, place.name: three}, {})
        done = measured(view, judge, data.fit, menu.recipe(choice))
        assert done["costs"]["bytes"] == choice.costs["bytes"]
        assert 1 / 3 < done["loss"][0] / choice.costs["loss"] < 5


def inputs_of(view: View, site: Linear, batches: Batches) -> list[torch.Tensor]:
    """The tokens that a linear reads, but for padding."""
    rows: list[torch.Tensor] = []
    for batch in batches:

        def visit(node: Any, operands: Any, results: Any, batch: Any = batch) -> None:
            if node is site.node:
                rows.append(operands[0][batch["attention_mask"].bool()])

        sweep(view, batch, observe=visit)
    return rows


def test_linears_that_are_not_probed_follow_their_neighbours(views: dict[str, View]) -> None:
    linears = recognize(views["fx"]).linears
    probed, filled = spread_over_blocks(linears, 10**6)
    assert list(linears) == probed and filled({"a": {"m": 1.0}}) == {"a": {"m": 1.0}}
    many = [replace(linears[0], name=str(i), block=i, role="q") for i in range(9)]
    probed, filled = spread_over_blocks(many, 3)
    assert [x.block for x in probed] == [0, 4, 8]
    whole = filled({x.name: {"m": 10.0 ** -(x.block or 0)} for x in probed})
    assert whole["2"] == pytest.approx({"m": 1e-2}) and len(whole) == 9
    hybrid = [x if x.block != 5 else replace(x, role="qkv") for x in many]
    probed, filled = spread_over_blocks(hybrid, 3)
    assert [x.block for x in probed] == [0, 4, 5, 8]  # of each role one at least
    assert filled({x.name: {"m": 1.0} for x in probed})["5"] == {"m": 1.0}
