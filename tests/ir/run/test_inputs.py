"""Inputs that are made: of the sizes that the graph needs, by what it does with them."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.text.graph import parse_graph

KINDS = ("fx", "onnx")


def graph(kind: str, lines: str) -> View:
    start = "fx graph\n" if kind == "fx" else 'onnx graph\nir_version 10\nopset "" 20\n'
    return parse_graph(start + lines)


IDS = """input %ids: i64[batch, seq]
input %mask: i64[batch, seq]
input %x: f16[batch, 123]
weight @table: f32[7, 3]
%rows: f32[batch, seq, 3] = embedding(@table, %ids)
%wide: f32[batch, seq] = cast(%mask) {dtype = f32}
%half: f16[batch, 123] = neg(%x)
output rows = %rows
output wide = %wide
output half = %half
"""


@pytest.mark.parametrize("kind", KINDS)
def test_samples_fit_the_graph(kind: str) -> None:
    view = graph(kind, IDS)
    found = sample_inputs(view, sizes={"batch": 2, "seq": 123})
    assert {k: (v.dtype, tuple(v.shape)) for k, v in found.items()} == {
        "ids": (torch.int64, (2, 123)),
        "mask": (torch.int64, (2, 123)),
        "x": (torch.float16, (2, 123)),
    }
    assert int(found["ids"].max()) == 6, "246 draws from seven ids reach the last one"
    assert bool((found["mask"] == 1).all())
    again = sample_inputs(view, sizes={"batch": 2, "seq": 123})
    assert all(torch.equal(found[k], again[k]) for k in found)
    plain = sample_inputs(view)
    assert [tuple(t.shape) for t in plain.values()] == [(2, 12), (2, 12), (2, 123)]
    other = sample_inputs(view, seed=1, sizes={"batch": 2, "seq": 123})
    assert not torch.equal(found["ids"], other["ids"])


def test_an_input_without_a_type_gives_no_sample() -> None:
    view = graph("onnx", "input %x: f32[*]\n%y: f32[*] = neg(%x)\noutput y = %y\n")
    with pytest.raises(BadInput, match="input x has no type: give samples"):
        sample_inputs(view)
