"""Which passes go together: refused on the recipe, or on the model's sites, before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.base import STORED, TOKENS, Context, Needs, Pass, PassResult
from graphwright.passes.forecast import plan
from graphwright.passes.recipe import Recipe
from graphwright.passes.registry import pass_class, pass_names
from graphwright.passes.rules import check_order, remarks

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Foreign(Pass):
    """A pass of another package, which says nothing of itself."""

    name: ClassVar[str] = "foreign"
    exact: ClassVar[bool] = False

    def run(self, context: Context) -> PassResult:
        raise AssertionError("the rules come first")

    def plan(self, context: Context) -> PassResult:
        return PassResult(edits=1)


@dataclass(frozen=True, kw_only=True)
class Watermark(Foreign):
    name: ClassVar[str] = "watermark"
    provides: ClassVar[tuple[str, ...]] = ("a watermark",)
    excludes: ClassVar[tuple[str, ...]] = ("a watermark",)


@dataclass(frozen=True, kw_only=True)
class Reader(Foreign):
    name: ClassVar[str] = "reader"
    exact: ClassVar[bool] = True
    follows: ClassVar[tuple[str, ...]] = ("a watermark",)


@dataclass(frozen=True, kw_only=True)
class Shorter(Foreign):
    name: ClassVar[str] = "shorter"
    provides: ClassVar[tuple[str, ...]] = (TOKENS,)


@dataclass(frozen=True, kw_only=True)
class Learner(Foreign):
    name: ClassVar[str] = "learner"
    needs: ClassVar[Needs] = Needs(calibration=True)


# --- on the recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("eora", "none before it changes weights: put one in front of it, such as hqq"),
        ("clean,svd-compensate", "svd-compensate corrects what an earlier pass did to weights"),
        ("eora,quantize", "none before it changes weights: put it behind quantize"),
        ("drop-blocks,eora", "eora corrects what an earlier pass did to weights, and none before"),
        ("hqq,eora,eora{rank=3}", "eora and eora would both correct the same sites"),
        ("hqq,eora,svd-compensate", "eora and svd-compensate would both correct the same sites"),
        ("quantize,bitstack", "quantize and bitstack would both store the same sites anew"),
        ("bitstack,easyquant", "bitstack and easyquant would both store the same sites anew"),
        ("hqq{include=a},clean,hqq{bits=8 include=a}", "hqq and hqq would both store"),
    ],
)
def test_refused(recipe: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        check_order(Recipe.parse(recipe).passes)


@pytest.mark.parametrize(
    "recipe",
    [
        "hqq,eora", "bitstack,svd-compensate", "hqq{include=a},quantize{exclude=a},eora",
        "quantize,drop-blocks,eora", "eora{optional=true}", "hqq,quantize{optional=true}",
        "hqq{include=a},eora{include=b}",
    ],
)  # fmt: skip
def test_taken(recipe: str) -> None:
    assert Recipe.parse(recipe).passes


def test_rules_hold_for_passes_of_other_packages() -> None:
    check_order((Watermark(), Reader()))
    check_order((Foreign(), Reader()))  # what a silent pass did is not known
    check_order((Foreign(), pass_class("eora")()))
    with pytest.raises(BadInput, match="reader needs a watermark, which no pass before it"):
        check_order((Shorter(), Reader()))
    with pytest.raises(BadInput, match="put it behind watermark"):
        check_order((Reader(), Watermark()))
    with pytest.raises(BadInput, match="both leave a watermark at the same sites"):
        check_order((Watermark(), Watermark()))


def test_every_pass_that_stores_weights_excludes_the_others() -> None:
    storing = [pass_class(name) for name in pass_names() if STORED in pass_class(name).provides]
    assert {"quantize", "easyquant", "hqq", "bitstack"} <= {kind.name for kind in storing}
    assert all(STORED in kind.excludes for kind in storing)


# --- on the model's sites ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("quantize,hqq{include=up}", "quantize and hqq would both store the same sites anew"),
        ("hqq{include=up},hqq{include=down},quantize{include=[up down]}", "hqq and quantize would"),
        ("hqq{include=up},eora{include=[gate down]}", r"its sites \(down, gate\): hqq takes"),
        ("hqq{include=upp},eora", "include=upp matches no site; did you mean up"),
    ],
)
def test_refused_by_site_before_any_work(
    toy_graph: Callable[..., View], toy_inputs: Inputs, kind: str, recipe: str, reason: str
) -> None:
    passes = (Shorter(), *Recipe.parse(recipe).passes)
    with pytest.raises(BadInput, match=reason):
        gw.optimize(toy_graph(kind), passes, samples=[toy_inputs], calibration=[toy_inputs])
    with pytest.raises(BadInput, match=reason):
        plan(toy_graph(kind), passes)


def test_sites_behind_a_pass_that_moves_blocks_are_not_known(graph: View) -> None:
    from graphwright.ir.canonical.families import canonicalize

    canonicalize(graph)
    structure = recognize(graph)
    passes = Recipe.parse("hqq{include=up},path{blocks=0},eora{include=[gate new.name]}").passes
    check_order(passes, structure)
    with pytest.raises(BadInput, match=r"include=new\.name matches no site"):
        check_order((passes[0], passes[2]), structure)


def test_some_sites_left_is_no_clash(graph: View, toy_inputs: Inputs) -> None:
    result = gw.optimize(graph, "hqq{include=up bits=8},quantize{bits=8}", samples=[toy_inputs])
    refused = result.report.passes[1].result.refused
    assert refused == [("up", "its weight is quantized already, to 8 bits")]


# --- remarks -------------------------------------------------------------------------------------


def test_statistics_are_better_taken_last() -> None:
    assert remarks((Shorter(), Learner())) == [[], []]
    first, (remark,) = remarks((Learner(), Shorter()))
    assert first == []
    assert remark == (
        "learner learned from the graph as it was before shorter, which drops tokens: put shorter "
        "in front of it, so that its statistics are those of the final graph"
    )
    (_, _, last) = remarks((Learner(), pass_class("hqq")(), pass_class("drop-blocks")()))
    assert "changes which blocks there are" in last[0]


def test_weights_fitted_together_are_not_mended_one_by_one() -> None:
    behind = {
        (first, last): remarks((pass_class(first)(), pass_class(last)()))[1]
        for first in ("autoround", "gptq") for last in ("svd-compensate", "eora")
    }  # fmt: skip
    (remark,) = behind.pop(("autoround", "svd-compensate"))
    assert "may come out worse than without it. Put eora here" in remark
    assert not any(behind.values())


def test_a_remark_reaches_the_plan_and_the_report(graph: View, toy_inputs: Inputs) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cut(Shorter):
        def run(self, context: Context) -> PassResult:
            return PassResult(edits=1)

    @dataclass(frozen=True, kw_only=True)
    class Look(Learner):
        def run(self, context: Context) -> PassResult:
            return PassResult(edits=1)

    passes = (Look(), Cut())
    optimized = gw.optimize(graph, passes, samples=[toy_inputs], calibration=[toy_inputs])
    assert "learner learned" in optimized.report.to_dict()["passes"][1]["notes"][0]
    assert "learner learned" in plan(graph, passes).passes[1][1].notes[0]
