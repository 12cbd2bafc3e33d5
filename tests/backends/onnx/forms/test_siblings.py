"""Linears of one input as one product: in the artifact, and parted again when it is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import graphwright as gw
import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.lowering import lowered
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.canonical.siblings import joined_name, parted_names
from graphwright.ir.core.joined_weights import JoinedWeight, RowsWeight, joined
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import CPU

from ...held_to_torch import TOLERANCE, run


@pytest.fixture(scope="module")
def quantized(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> View:
    folder = tmp_path_factory.mktemp("llama")
    models.llama(layers=2).module.model.save_pretrained(folder)
    return gw.optimize(gw.load(folder), "quantize{bits=4 group=16}").graph


def kinds(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def sites(view: View) -> dict[str, tuple[str, str]]:
    """Roles of the linears and names of their weights, by name."""
    return {s.name: (s.role, view.name(s.weight)) for s in recognize(view).linears}


def test_a_block_has_four_products_and_is_read_as_seven(quantized: View) -> None:
    model = lowered(quantized).model
    blocks, linears = len(recognize(quantized).blocks), len(recognize(quantized).linears)
    counts = kinds(model)
    assert (counts["MatMulNBits"], counts["Split"]) == (linears - 3 * blocks, 2 * blocks)
    # Heads are parted after they are transposed: one transposition, and one of the result.
    assert counts["Transpose"] == 2 * blocks + counts["MatMul"] // 2
    view = OnnxView(model.clone())
    canonicalize(view)
    assert sites(view) == sites(quantized)
    for site in recognize(quantized).linears[:3]:
        known = {name: handle.read() for name, handle in quantized.weights().items()
                 if name.startswith(site.name)}  # fmt: skip
        for name, numbers in known.items():
            assert torch.equal(view.weights()[name].read(), numbers)
    assert kinds(lowered(view).model) == counts


def test_one_product_computes_the_same(quantized: View) -> None:
    batch = sample_inputs(quantized)
    for name, value in zip(quantized.input_names(), quantized.inputs(), strict=True):
        if name.startswith("past"):
            _, heads, _, width = quantized.type(value).shape or ()
            batch[name] = torch.zeros(len(batch["input_ids"]), int(heads), 0, int(width))
    apart = replace(CPU, rows=tuple(row for row in CPU.rows if row.form != "one-product"))
    models = [lowered(quantized, target).model for target in (CPU, apart)]
    assert kinds(models[0])["MatMulNBits"] < kinds(models[1])["MatMulNBits"]
    outputs = [run(model, batch)["logits"] for model in models]
    torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE)


class Several(torch.nn.Module):
    """Linears of one input, by the names of their modules."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, torch.nn.Linear(32, 16, bias=name == "biased"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.tanh()
        return torch.cat([getattr(self, name)(x) for name in self.names], -1)


@pytest.mark.parametrize(
    ("names", "passes", "products"),
    [
        (("a", "b", "c"), "quantize{bits=4 group=16}", 1),
        (("a", "b", "biased"), "quantize{bits=4 group=16}", 2),
        (
            ("a", "b", "c"),
            "quantize{bits=4 group=16 include=a},quantize{bits=4 group=32 exclude=a}",
            2,
        ),
        (("a", "b", "c", "d"), "quantize{bits=4 group=16}", 4),
    ],
    ids=["alike", "one with a bias", "one in other groups", "more than three"],
)
def test_what_is_not_alike_stays_apart(names: Any, passes: str, products: int) -> None:
    graph = gw.optimize(gw.trace(Several(*names), (torch.randn(2, 32),)), passes).graph
    assert kinds(lowered(graph).model)["MatMulNBits"] == products


def test_names_say_what_is_joined() -> None:
    names = [f"layers.0.{part}_proj.codes" for part in "qkv"]
    name = joined_name(names)
    assert name == "layers.0.q_proj+k_proj+v_proj.codes"
    assert parted_names(name) == names
    assert joined_name(["a.q.codes", "b.k.codes"]) is None  # they differ in two parts
    assert joined_name(["a.codes", "a.b.codes"]) is None
    assert joined_name(["a+b.codes", "c.codes"]) is None
    assert parted_names("a.codes") == ["a.codes"]


def test_rows_of_one_weight_are_that_weight_again() -> None:
    whole = MemoryWeight(torch.arange(12.0).reshape(6, 2))
    parts = [RowsWeight(whole, 0, 4), RowsWeight(whole, 4, 6)]
    assert joined(parts) is whole
    assert isinstance(joined(parts[:1]), JoinedWeight)
    turned = joined(parts[::-1])
    assert torch.equal(turned.read(), torch.cat([whole.read()[4:], whole.read()[:4]]))
    with pytest.raises(ValueError, match="are not alike"):
        joined([whole, MemoryWeight(torch.zeros(2, 3))])
