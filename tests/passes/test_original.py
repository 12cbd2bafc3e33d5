"""A source that somebody else compressed, held against the model that it was made from."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab import dense_weight
from graphwright.ir.vocab.builder import Builder
from graphwright.passes.forecast import plan
from graphwright.passes.original import prepare

from .conftest import Toy, ids

Inputs = dict[str, torch.Tensor]
WHOLE = "eora{rank=64 factors=float32}"
"""A path of every rank closes the whole gap: what is left is rounding."""


class Normed(Toy):
    """The toy with a norm before its gated layer, whose weights can take other units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(self.gate.in_features)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(x)


def many() -> list[Inputs]:
    rng = torch.Generator().manual_seed(3)
    return [{"ids": torch.randint(0, 17, (6, 40), generator=rng)} for _ in range(2)]


@pytest.fixture(scope="module")
def dense() -> View:
    torch.manual_seed(0)
    module = Normed().eval()
    with torch.no_grad():
        module.norm.weight.copy_(torch.logspace(-1, 1, module.gate.in_features))
        module.up.weight.mul_(torch.logspace(-1, 1, module.up.out_features)[:, None])
    return gw.trace(module, (), ids())


def run(view: View) -> torch.Tensor:
    return next(iter(sweep(view, ids()).values()))


def optimized(source: View, recipe: str, original: View | None = None) -> Any:
    return gw.optimize(source, recipe, samples=[ids()], calibration=many(), original=original)


@pytest.fixture(scope="module")
def scaled(dense: View) -> View:
    """The dense graph with other units and codes: AWQ's, but for the head, which stays whole."""
    return optimized(dense, "awq{bits=4 exclude=head}").graph


@pytest.mark.parametrize("propagate", ["compensated", "dense"])
def test_the_gap_is_to_the_original_in_the_units_of_the_source(
    dense: View, scaled: View, propagate: str
) -> None:
    """AWQ has divided a norm and the rows of ``up``; a path of every rank gives the original."""
    recipe = f"eora{{rank=64 factors=float32 propagate={propagate}}}"
    repaired = optimized(scaled, recipe, dense)
    off = torch.linalg.norm(run(scaled) - run(dense)) / torch.linalg.norm(run(dense))
    assert off > 0.01
    torch.testing.assert_close(run(repaired.graph), run(dense), rtol=1e-4, atol=1e-4)
    refused = dict(repaired.report.passes[0].result.refused)
    assert refused["head"].startswith("its weight is the source")


def test_a_low_rank_takes_a_part_of_the_gap(dense: View, scaled: View) -> None:
    def off(view: View) -> float:
        return float(torch.linalg.norm(run(view) - run(dense)))

    assert off(optimized(scaled, "eora{rank=8}", dense).graph) < 0.8 * off(scaled)


def _in_another_order(view: View, name: str) -> View:
    """The graph with a linear's columns, and its input's features, in another order."""
    shuffled = view.copy()
    canonicalize(shuffled)
    linear = next(x for x in recognize(shuffled).linears if x.name == name)
    order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(5))
    weight = shuffled.weight(linear.weight)
    assert weight is not None
    x = Builder(shuffled, linear.node).index_select(
        linear.x, shuffled.add_weight("order", MemoryWeight(order)), dim=-1
    )
    shuffled.set_operand(linear.node, 0, x)
    shuffled.set_weight(linear.weight, MemoryWeight(weight.read()[:, order]))
    return shuffled


def test_columns_in_the_order_of_their_groups(dense: View) -> None:
    source = optimized(_in_another_order(dense, "down"), "quantize{bits=2 include=down}").graph
    repaired = optimized(source, WHOLE, dense)
    assert float((run(source) - run(dense)).abs().max()) > 0.01
    torch.testing.assert_close(run(repaired.graph), run(dense), rtol=1e-4, atol=1e-4)
    untouched = [site for site, _ in repaired.report.passes[0].result.refused]
    assert untouched == ["gate", "up", "head"]


def test_the_graphs_that_were_given_stay_as_they_are(dense: View, scaled: View) -> None:
    before = [(view.edits, run(view)) for view in (dense, scaled)]
    optimized(scaled, "eora{rank=2}", dense)
    for view, (edits, outputs) in zip((dense, scaled), before, strict=True):
        assert view.edits == edits
        assert torch.equal(run(view), outputs)


def test_the_original_is_prepared_without_a_copy_of_its_weights(dense: View, scaled: View) -> None:
    """Its weights in other units are computed when they are read."""
    original = prepare(dense, scaled, recognize(scaled))
    theirs = {x.name: x for x in recognize(original.view).linears}
    ours = {x.name: x for x in recognize(scaled).linears}
    assert set(original.original_keys) == {"head"}
    for name in ("gate", "up", "down"):
        weight = original.view.weight(theirs[name].weight)
        assert not isinstance(weight, MemoryWeight)
        gap = dense_weight(scaled, ours[name].node) - dense_weight(original.view, theirs[name].node)
        size = dense_weight(original.view, theirs[name].node)
        assert torch.linalg.norm(gap) < 0.15 * torch.linalg.norm(size)


def test_a_forecast_reads_no_weight(dense: View, scaled: View, no_reads: Any) -> None:
    with no_reads():
        planned = plan(scaled, "eora{rank=4}", original=dense)
    (_, result), = planned.passes
    assert [site.name for site in result.sites] == ["gate", "up", "down"]


def _other(width: int = 32, seed: int = 1) -> View:
    torch.manual_seed(seed)
    module = Toy().eval()
    module.down = torch.nn.Linear(width, module.head.in_features)
    if width != module.gate.out_features:
        module.gate = torch.nn.Linear(module.gate.in_features, width)
        module.up = torch.nn.Linear(module.gate.in_features, width, bias=False)
    return gw.trace(module, (), ids())


def test_what_is_no_original_is_refused(dense: View, scaled: View) -> None:
    with pytest.raises(BadInput, match=r"--original .*gate is \[32, 32\], and \[40, 32\] in the"):
        optimized(scaled, "eora", _other())
    with pytest.raises(BadInput, match=r"weight of gate is that of another model.* its cosine"):
        optimized(scaled, "eora", _other(40))
    with pytest.raises(BadInput, match=r"--original .*gate is quantized there too"):
        optimized(scaled, "eora", scaled)
    with pytest.raises(BadInput, match="an original is for passes that close the gap to it"):
        optimized(scaled, "quantize{include=head}", dense)
    with pytest.raises(BadInput, match="it has no linear gate, which the source has"):
        head = gw.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.ones(1, 4),))
        optimized(scaled, "eora", head)
    with pytest.raises(BadInput, match="none before it changes weights: put one in front of it"):
        optimized(scaled, "eora")
