"""The checks themselves: each fault is found, and told for what it is."""

from __future__ import annotations

import math

import pytest
import torch
from graphwright.ir.core.errors import InvalidGraph
from graphwright.ir.core.view import View
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.verify import (
    EXACT_REL_L2,
    Rule,
    check_structure,
    compare,
    difference,
    exact_tolerance,
)
from graphwright.ir.text.graph import parse_graph

KINDS = ("fx", "onnx")


def graph(kind: str, lines: str) -> View:
    start = "fx graph\n" if kind == "fx" else 'onnx graph\nir_version 10\nopset "" 20\n'
    return parse_graph(start + lines)


CHAIN = """input %x: f32[batch, 5]
weight @w: f32[5, 3] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0]
%a: f32[batch, 3] = matmul(%x, @w)
%b: f32[batch, 3] = tanh(%a)
%y: f32[batch, 3] = add(%a, %b)
output y = %y
"""


def test_equal_tensors_do_not_differ() -> None:
    a = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    gap = difference(a, a.clone())
    assert (gap.rel_l2, gap.cosine, gap.max_abs) == (0.0, 1.0, 0.0)
    assert difference(torch.empty(0, 5), torch.empty(0, 5)).rel_l2 == 0.0


def test_difference_is_relative_to_the_first() -> None:
    gap = difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    assert gap.rel_l2 == pytest.approx(0.1)
    assert gap.max_abs == pytest.approx(0.5)
    assert gap.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert gap.to_dict() == {
        "rel_l2": gap.rel_l2, "cosine": gap.cosine, "max_abs": gap.max_abs,
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_new_value_that_is_not_finite_is_an_infinite_error(value: float) -> None:
    gap = difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, value]))
    assert gap.rel_l2 == math.inf
    assert not gap.finite


def test_an_infinity_of_the_other_sign_is_an_infinite_error() -> None:
    assert not difference(torch.tensor([math.inf]), torch.tensor([-math.inf])).finite


def test_anything_is_infinitely_far_from_zero() -> None:
    assert difference(torch.zeros(3), torch.tensor([0.0, 1e-9, 0.0])).rel_l2 == math.inf


def test_near_zero_it_is_the_difference_itself_that_must_be_small() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert difference(zeros, zeros + 5e-8).within(1e-4)
    assert not difference(zeros, zeros + 2e-7).within(1e-4)
    assert difference(ones, ones + 5e-5).within(1e-4)
    assert not difference(ones, ones + 2e-4).within(1e-4)
    assert not difference(ones * 1e-2, ones * 1e-2 * (1 + 2e-4)).within(1e-4)
    assert difference(zeros, ones).finite, "far from zero is not a lack of numbers"


HALF = CHAIN.replace("f32", "f16")


def test_a_plain_artifact_is_judged_by_its_graph_alone() -> None:
    rule, ones = Rule.of(graph("fx", CHAIN)), torch.ones(8)
    assert rule.allows(difference(ones, ones * (1 + 5e-5)))
    assert not rule.allows(difference(ones, ones * (1 + 2e-4)))
    same = difference(ones, ones)
    assert not rule.allows_beside(same, same)


def test_a_coarse_one_may_be_about_as_far_from_the_source_as_its_graph() -> None:
    rule, ones = Rule.of(graph("fx", HALF)), torch.ones(8)
    near, far, farther = (difference(ones, ones * (1 + e)) for e in (0.02, 0.03, 0.04))
    assert not rule.allows(near), "not what the graph gives"
    assert rule.allows_beside(far, near), "0.02 * 1.5 and the tolerance of f16"
    assert not rule.allows_beside(farther, near)


def test_shapes_and_names_must_agree() -> None:
    with pytest.raises(InvalidGraph, match=r"shapes differ: \[3, 1\] became \[1, 3\]"):
        difference(torch.zeros(3, 1), torch.zeros(1, 3))
    with pytest.raises(InvalidGraph, match=r"outputs changed from \['a'\] to \['b'\]"):
        compare({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    assert compare({"a": torch.ones(1)}, {"a": torch.ones(1)})["a"].rel_l2 == 0.0


def test_integers_have_no_tolerance() -> None:
    assert exact_tolerance(torch.int64) == 0.0
    assert exact_tolerance(torch.float32) == EXACT_REL_L2[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_graph_passes(kind: str) -> None:
    check_structure(graph(kind, CHAIN))


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_nobody_takes_is_no_fault(kind: str) -> None:
    lines = """input %x: f32[batch, 5]
(%low: f32[batch, 1], _, %high: f32[batch, 2]) = split(%x) {sizes = (1, 2, 2), dim = 1}
%y: f32[batch, 2] = add(%low, %high)
output y = %y
"""
    check_structure(graph(kind, lines))


def test_a_use_before_the_value_in_fx() -> None:
    view = graph("fx", CHAIN)
    assert isinstance(view, FxView)
    a, b, _ = view.nodes()
    a.prepend(b)
    with pytest.raises(InvalidGraph, match="b uses a before it is computed"):
        check_structure(view)


def test_a_use_before_the_value_in_onnx() -> None:
    view = graph("onnx", CHAIN)
    assert isinstance(view, OnnxView)
    a, b = list(view.nodes())[:2]
    view.model.graph.remove(b)
    a.prepend(b)
    with pytest.raises(InvalidGraph, match="uses a before it is computed"):
        check_structure(view)


def test_one_name_for_two_values() -> None:
    view = graph("onnx", CHAIN)
    a, b = list(view.nodes())[:2]
    a.outputs[0].name = b.outputs[0].name
    with pytest.raises(InvalidGraph, match="the name b stands for two values"):
        check_structure(view)


def test_an_output_that_nothing_computes() -> None:
    view = graph("onnx", CHAIN)
    assert isinstance(view, OnnxView)
    *_, last = view.nodes()
    view.model.graph.remove(last)
    with pytest.raises(InvalidGraph, match="the output y is never computed"):
        check_structure(view)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", ["f32[batch, 4]", "f32[3]"])
def test_a_type_that_the_operands_contradict(kind: str, type_: str) -> None:
    view = graph(kind, CHAIN.replace("%y: f32[batch, 3]", f"%y: {type_}"))
    with pytest.raises(InvalidGraph) as caught:
        check_structure(view)
    assert f"add gives f32[batch, 3], but the graph says {type_}" in str(caught.value)


def test_operands_that_do_not_fit() -> None:
    view = graph("fx", CHAIN.replace("matmul(%x, @w)", "matmul(%x, %x)").replace("batch", "7"))
    with pytest.raises(InvalidGraph, match=r"a: matmul does not fit its operands: .* 5 and 7"):
        check_structure(view)


def test_complex_numbers_differ_by_both_parts() -> None:
    a = torch.tensor([3 + 4j, 0j])
    assert difference(a, a).rel_l2 == 0.0
    gap = difference(a, torch.tensor([3 + 1j, 0j]))
    assert gap.rel_l2 == pytest.approx(0.6) and gap.max_abs == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_ids_and_flags_are_compared_by_the_share_that_differ(dtype: torch.dtype) -> None:
    expected = torch.full((1000,), 50_000).to(dtype)
    actual = expected.clone()
    actual[:2] = torch.tensor([50_001, 0]).to(dtype)
    gap = difference(expected, actual)
    assert gap.rel_l2 == (0.001 if dtype == torch.bool else 0.002)
    assert not gap.within(1e-4) and gap.within(1e-2)
    assert difference(expected, expected).within(0.0)
    rounded = difference(torch.full((9,), 100, dtype=torch.uint8), torch.full((9,), 101).byte())
    assert rounded.rel_l2 == pytest.approx(0.01), "quantities of 8 bits are compared as numbers"
