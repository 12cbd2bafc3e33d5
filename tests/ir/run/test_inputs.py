"""Inputs that are made: of the sizes that the graph needs, by what it does with them."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.run.batches import check_batches
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import next_step
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
    samples = sample_inputs(view, sizes={"batch": 2, "seq": 123})
    assert {k: (v.dtype, tuple(v.shape)) for k, v in samples.items()} == {
        "ids": (torch.int64, (2, 123)),
        "mask": (torch.int64, (2, 123)),
        "x": (torch.float16, (2, 123)),
    }
    assert int(samples["ids"].max()) == 6, "246 draws from seven ids reach the last one"
    assert bool((samples["mask"] == 1).all())
    again = sample_inputs(view, sizes={"batch": 2, "seq": 123})
    assert all(torch.equal(samples[k], again[k]) for k in samples)
    plain = sample_inputs(view)
    assert [tuple(t.shape) for t in plain.values()] == [(2, 12), (2, 12), (2, 123)]
    other = sample_inputs(view, seed=1, sizes={"batch": 2, "seq": 123})
    assert not torch.equal(samples["ids"], other["ids"])


def test_an_input_without_a_type_gives_no_sample() -> None:
    view = graph("onnx", "input %x: f32[*]\n%y: f32[*] = neg(%x)\noutput y = %y\n")
    with pytest.raises(BadInput, match="input x has no type: give samples"):
        sample_inputs(view)


# --- what an ONNX graph needs ---------------------------------------------------------------------

NEEDS = {
    "channels of a convolution": (
        """input %x: f32[b, c, h, w]
weight @k: f32[3, 12, 3, 3]
%y: f32[b, 3, h2, w2] = conv(%x, @k) {stride = (1, 1), padding = (1, 1), dilation = (1, 1), \
groups = 1}
""",
        (2, 12, 7, 5),
    ),
    "windows behind each other": (
        """input %x: f32[b, t]
weight @k: f32[3, 1, 10]
weight @l: f32[3, 3, 4]
%u: f32[b, 1, t] = unsqueeze(%x) {dims = (1)}
%v: f32[b, 3, t2] = conv(%u, @k) {stride = (5), padding = (0), dilation = (1), groups = 1}
%r: f32[b, 3, t2] = relu(%v)
%y: f32[b, 3, t3] = conv(%r, @l) {stride = (2), padding = (0), dilation = (2), groups = 1}
""",
        (2, (7 - 1) * 5 + 10),
    ),
    "a window without a size": (
        """input %x: f32[b, 3, t]
input %k: f32[4, 3, h]
%y: f32[b, 4, t2] = conv(%x, %k) {stride = (1), padding = (2), dilation = (1), groups = 1}
""",
        (2, 3, 12),
    ),
    "a product": (
        "input %x: f32[e, n, 8]\nweight @w: f32[3, 8, 4]\n%y: f32[3, n, 4] = matmul(%x, @w)\n",
        (3, 12, 8),
    ),
    "a dimension that goes": (
        "input %x: f32[b, e, n]\n%y: f32[b, n] = squeeze(%x) {dims = (1)}\n", (2, 1, 7)
    ),
    "a sum": ("input %x: f32[b, n]\nweight @w: f32[9]\n%y: f32[b, 9] = add(%x, @w)\n", (2, 9)),
    "rows of a shape": (
        "input %x: f32[b, n]\n%y: f32[b, m, 5] = reshape(%x, 0, -1, 5)\n", (2, 15),
    ),
    "numbers of a shape": (
        "input %x: f32[3, n]\n%y: f32[3, 4, 5] = reshape(%x, 3, 4, 5)\n", (3, 20),
    ),
    "parts": (
        """input %x: f32[b, n]
(%a: f32[b, 4], %y: f32[b, 7]) = split(%x) {sizes = (4, 7), dim = 1}
""",
        (2, 11),
    ),
    "a state of one row": (
        """input %x: f32[t, b, 8]
input %h: f32[1, 1, 4]
weight @w: f32[1, 12, 8]
weight @r: f32[1, 12, 4]
(%a: f32[t, 1, b, 4], %y: f32[1, b, 4]) = ai.onnx::GRU(%x, @w, @r, None, None, %h) \
{hidden_size = 4}
""",
        (2, 1, 8),
    ),
    "widened again, and added": (
        """input %x: f32[b, 1, p2o.Dim.0, w]
weight @k: f32[3, 1, 3, 3]
weight @l: f32[3, 3, 3, 3]
weight @twice: f32[4] = [1.0, 1.0, 2.0, 3.0]
%u: f32[b, 3, h2, w2] = conv(%x, @k) {stride = (2, 2), padding = (1, 1), dilation = (1, 1), \
groups = 1}
%v: f32[b, 3, h4, w4] = conv(%u, @l) {stride = (2, 3), padding = (1, 1), dilation = (1, 1), \
groups = 1}
%z: f32[b, 3, h2, w2] = ai.onnx::Resize(%v, None, @twice)
%y: f32[b, 3, h2, w2] = add(%u, %z)
""",
        (2, 1, 12, 12),
    ),
    "no names": (
        "input %x: f32[?, ?, 6]\nweight @w: f32[9, 6]\n%y: f32[?, 9, 6] = add(%x, @w)\n", (2, 9, 6),
    ),
}  # fmt: skip


def filled(lines: str) -> View:
    """An ONNX graph whose weights hold numbers: ones, where the text gives none."""
    view = graph("onnx", lines)
    for value in {value for node in view.nodes() for value in view.arguments(node)}:
        held = view.weight(value)
        if held is not None and not isinstance(held, MemoryWeight):
            view.set_weight(value, MemoryWeight(torch.ones(held.shape)))
    return view


@pytest.mark.parametrize("name", NEEDS)
def test_samples_have_the_sizes_that_nodes_need(name: str) -> None:
    lines, shape = NEEDS[name]
    view = filled(lines + "output y = %y\n")
    samples = sample_inputs(view)
    assert tuple(samples["x"].shape) == shape
    sweep(view, samples)


def test_an_index_keeps_to_rows_that_have_a_size_by_an_input_behind_it() -> None:
    lines = """input %nodes: f32[n, 6]
input %graph: i64[n, 6]
input %slots: f32[g, 6]
%y: f32[g, 6] = ai.onnx::ScatterElements(%slots, %graph, %nodes)
output y = %y
"""
    view = graph("onnx", lines)
    samples = sample_inputs(view, sizes={"n": 40, "g": 3})
    assert int(samples["graph"].max()) == 2
    sweep(view, samples)


def test_a_sample_of_a_shape_is_one() -> None:
    lines = "input %x: f32[b, 6]\ninput %s: i64[3]\n%y: f32[?, ?, ?] = reshape(%x, %s)\n"
    view = graph("onnx", lines + "output y = %y\n")
    samples = sample_inputs(view)
    assert samples["s"].tolist() == [-1, 1, 1]
    assert sweep(view, samples)["y"].shape == (12, 1, 1)


def test_an_input_larger_than_memory_is_refused() -> None:
    view = graph("onnx", f"input %x: f32[{1 << 40}, 64]\n%y: f32[?] = neg(%x)\noutput y = %y\n")
    with pytest.raises(BadInput, match=r"the input x, f32.*would take 1125899.9 GB of memory"):
        sample_inputs(view)


def test_what_grows_beyond_memory_is_refused_before_it_runs() -> None:
    doubled = "".join(
        f"%a{i}: f32[?, 64] = concat(%a{i - 1}, %a{i - 1}) {{dim = 0}}\n" for i in range(1, 41)
    )
    lines = f"input %x: f32[b, 64]\n%a0: f32[b, 64] = neg(%x)\n{doubled}output y = %a40\n"
    view = graph("onnx", lines)
    with pytest.raises(BadInput, match=r"its result f32\[\d+, 64\] would take .* GB of memory"):
        sweep(view, {"x": torch.ones(2, 64)})


def test_positions_follow_from_the_mask() -> None:
    lines = """input %input_ids: i64[b, s]
input %attention_mask: i64[b, s]
input %position_ids: i64[b, s]
weight @t: f32[9, 3]
%e: f32[b, s, 3] = embedding(@t, %input_ids)
%y: f32[b, s, 3] = add(%e, 0.0)
%p: i64[b, s] = add(%position_ids, 0)
output y = %y
output p = %p
"""
    view = filled(lines)
    assert sample_inputs(view)["position_ids"].tolist() == [list(range(12))] * 2
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": mask}
    check_batches(view, [inputs])
    assert sweep(view, inputs)["p"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    step = next_step({**inputs, "position_ids": mask}, {"present.0.key": torch.zeros(2, 1, 4, 2)})
    assert step is not None and step["position_ids"].tolist() == [[2], [4]]


def test_the_step_after_a_pruned_prompt_has_the_mask_of_its_cache() -> None:
    """Image tokens left before the first slot; padding is on the left and stays."""
    prompt = {"input_ids": torch.zeros(1, 6, dtype=torch.int64),
             "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}  # fmt: skip
    step = next_step(prompt, {"present.0.key": torch.zeros(1, 1, 3, 2)})
    assert step is not None and step["attention_mask"].tolist() == [[0, 1, 1, 1]]
