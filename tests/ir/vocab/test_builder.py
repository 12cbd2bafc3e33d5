"""The builder: ops by their names at one place of a graph, and what it says of names unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import Refusal
from graphwright.ir.run.sweep import sweep
from graphwright.ir.vocab.builder import Builder

Drafts = Callable[..., Any]


def test_nodes_stand_before_the_place_in_the_order_of_their_making(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.x))
    (last,) = view.nodes()
    b = Builder(view, last)
    half = b.mul(b.clamp(d.x, min=0.0, max=1.0), 0.5)
    view.set_operand(last, 0, half)
    assert [view.op(node) for node in view.nodes()] == ["clamp", "mul", "exp"]
    x = torch.randn(3, 5)
    (result,) = sweep(view, {"x": x}).values()
    assert torch.equal(result, torch.exp(x.clamp(0.0, 1.0) * 0.5))


def test_name_and_type_may_be_given(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.x))
    (last,) = view.nodes()
    value = Builder(view, last).build("neg", d.x, like=view.outputs()[0], name="turned")
    assert view.name(view.maker(value)) == "turned"
    assert view.type(value) == view.type(view.outputs()[0])


def test_an_unknown_op_is_named_with_near_misses(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.x))
    b = Builder(view, next(iter(view.nodes())))
    with pytest.raises(AttributeError, match="no op 'sigmod'; did you mean sigmoid"):
        _ = b.sigmod
    with pytest.raises(TypeError, match="softmax has no attribute axis"):
        b.softmax(d.x, dim=1, axis=1)


def test_a_number_is_no_tensor_and_an_input_has_no_maker(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("slice", d.x, 0, 2, dim=0))
    (node,) = view.nodes()
    assert view.tensor(node) is d.x
    assert view.maker(view.outputs()[0]) is node
    with pytest.raises(Refusal, match=r"operand 5 of .* is not a tensor"):
        view.tensor(node, 5)
    with pytest.raises(Refusal, match="x is not computed in the graph"):
        view.maker(d.x)
