"""GBLM: gradients as torch has them, masks by the formula on both kinds, refusals."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.gradients import gradient_energies, loss_graph
from graphwright.ir.run.statistics import Square
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.gblm import gblm_scores
from onnx.helper import make_node as node
from torch import Tensor

from ...ir.canonical.written import read, written
from ...models import Small
from ..calibrated import rel

KINDS = ("fx", "onnx")
Model = tuple[Small, dict[str, View]]
RECIPE = "gblm{sparsity=0.5 exclude=*lm_head}"


def texts(count: int = 3) -> list[dict[str, Tensor]]:
    """Two texts each, the second one shorter."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return [{"input_ids": torch.randint(0, 97, (2, 9), generator=draw), "attention_mask": mask}
            for _ in range(count)]  # fmt: skip


def run(view: View, recipe: str) -> Any:
    return gw.optimize(view, recipe, samples=texts(1), calibration=texts())


def by_torch(module: torch.nn.Module) -> dict[str, Tensor]:
    """Sums of squared gradients by name, from the model itself, text by text without padding."""
    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for batch in texts():
        for ids, mask in zip(*batch.values(), strict=True):
            text = ids[mask.bool()][None]
            module.zero_grad()
            logits = module(input_ids=text, attention_mask=torch.ones_like(text))["logits"]
            scores = logits[0, :-1].log_softmax(-1)
            (-scores.gather(1, text[0, 1:, None]).sum()).backward()
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad**2
    module.zero_grad()
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torch(kind: str, llama: Model) -> None:
    small, views = llama
    expected, view = by_torch(small.module), views[kind]
    linears = recognize(view).linears
    energies = gradient_energies(
        loss_graph(view), texts(), [x.weight for x in linears], lambda done, of: None
    )
    for linear, energy in zip(linears, energies, strict=True):
        reference = expected[f"{linear.name}.weight"]
        torch.testing.assert_close(energy, reference, rtol=1e-3, atol=1e-6 * float(reference.max()))


def test_scores_are_the_formula_in_units_of_their_means() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=draw), torch.randn(40, 8, generator=draw)
    energy, square = torch.rand(6, 8, generator=draw), Square()
    square.see(x)
    norms, roots = x.norm(dim=0), energy.sqrt()
    expected = weight.abs() * (norms / norms.mean() + 3 * roots / roots.mean())
    torch.testing.assert_close(gblm_scores(weight, square, energy, 3.0), expected)
    by_inputs = gblm_scores(weight, square, torch.zeros(6, 8), 3.0)
    torch.testing.assert_close(by_inputs, weight.abs() * norms / norms.mean())


def test_both_kinds_get_one_mask_and_without_gradients_it_is_wanda(llama: Model) -> None:
    _, views = llama
    results = [run(views[kind], RECIPE) for kind in KINDS]
    outputs = [sweep(result.graph, texts(1)[0]) for result in results]
    assert rel(*outputs) < 1e-4
    assert {site.sparsity for site in results[0].report.passes[0].result.sites} == {0.5}
    plain = sweep(run(views["fx"], RECIPE.replace("gblm", "wanda")).graph, texts(1)[0])
    assert rel(plain, outputs[0]) > 1e-2, "gradients move zeros"
    without = RECIPE.replace("{", "{gradient=0 ")
    assert rel(plain, sweep(run(views["fx"], without).graph, texts(1)[0])) < 1e-6


def test_what_has_no_gradients(graph: View, toy_inputs: dict[str, Tensor], llama: Model) -> None:
    for plan in (False, True):
        with pytest.raises(BadInput, match="they need input_ids among the inputs and logits among"):
            if plan:
                gw.plan(graph, "gblm")
            else:
                gw.optimize(graph, "gblm", samples=[toy_inputs], calibration=[toy_inputs])
    nodes = [node("Gather", ["table", "input_ids"], ["x"]), node("Hardmax", ["x"], ["logits"])]
    ids = {"input_ids": np.zeros((2, 3), np.int64)}
    stops = read(written(nodes, ids, {"table": np.ones((5, 6), np.float32)}, ["logits"]))
    with pytest.raises(BadInput, match=r"no gradient comes through .*`Hardmax`"):
        loss_graph(stops)
    with pytest.raises(BadInput, match="gblm needs calibration data"):
        gw.optimize(llama[1]["fx"], "gblm", samples=texts(1))
    with pytest.raises(BadInput, match="gradient=-1"):
        gw.passes.GBLM(gradient=-1.0)
