"""Rotations on graphs of both kinds: exact where they apply, what they do to outliers, refusals."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.passes.weights.hadamard import hadamard
from torch import Tensor

from ...models import BUILDERS, raised, traced
from ..calibrated import rel
from .conftest import Model

KINDS = ("fx", "onnx")
REFUSED = {
    "gpt2": "the residual stream starts at add, not at a table's rows",
    "gemma2": "the residual stream starts at mul, not at a table's rows",
    "bert": "the residual stream starts at layer_norm, not at a table's rows",
    "vit": "the residual stream starts at add, not at a table's rows",
}


LINEARS = {"llama": 15, "qwen2": 8}


@pytest.fixture(scope="module")
def models(llama: Model) -> dict[str, Model]:
    tied = BUILDERS["qwen2"](layers=1)
    return {"llama": llama, "qwen2": (tied, raised(tied))}


def weights(view: View) -> dict[str, Tensor]:
    tensors = {}
    for linear in recognize(view).linears:
        handle = view.weight(linear.weight)
        assert handle is not None
        tensors[linear.name] = handle.read()
    return tensors


@pytest.mark.parametrize("order", [1, 2, 12, 56, 64, 135])
def test_the_matrix_is_orthogonal_and_even(order: int) -> None:
    rotation = hadamard(order, seed=3)
    assert torch.allclose(rotation @ rotation.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert float(rotation.abs().max()) <= (2 / order) ** 0.5 + 1e-12
    if order == 64:
        assert torch.allclose(rotation.abs(), torch.full_like(rotation, 1 / 8))
    assert order < 12 or not torch.equal(rotation, hadamard(order, seed=4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_outputs_and_names_stay(family: str, kind: str, models: Any) -> None:
    small, views = models[family]
    source = views[kind]
    result = gw.optimize(source, "rotate", samples=[small.inputs])
    (step,) = result.report.passes
    assert step.result.refused == [] and len(step.result.sites) == LINEARS[family]
    assert 0 < rel(sweep(source, small.inputs), sweep(result.graph, small.inputs)) < 2e-6
    before, after = weights(source), weights(result.graph)
    assert before.keys() == after.keys()
    assert all(not torch.allclose(before[n], after[n], atol=1e-3) for n in before)
    embeddings = [recognize(v).embeddings[0].name for v in (source, result.graph)]
    assert embeddings[0] == embeddings[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_stored_a_second_time(kind: str, models: Any, no_reads: Any) -> None:
    small, views = models["qwen2"]
    with no_reads():
        planned = gw.plan(views[kind], "rotate")
    (step,) = gw.optimize(views[kind], "rotate", samples=[small.inputs]).report.passes
    (head,) = (site for site in step.result.sites if site.note)
    assert head.name.endswith("lm_head") and head.note.startswith("tied to its table before")
    assert step.bytes_after - step.bytes_before == 97 * 32 * 4 == head.bytes_after
    assert planned.artifact_bytes == step.bytes_after
    assert planned.passes[0][1].sites == step.result.sites


@pytest.mark.parametrize("part", ["stream", "heads"])
def test_an_outlier_is_spread(part: str, llama: Model) -> None:
    """One feature of the stream, or of each head, is a hundred times as large as the others."""
    small, source = llama[0], llama[1]["fx"].copy()
    other = "heads" if part == "stream" else "stream"
    role, rows = ("o", slice(3, 4)) if part == "stream" else ("v", slice(3, None, 8))
    grown, *_ = (linear for linear in recognize(source).linears if linear.role == role)
    weight = weights(source)[grown.name].clone()
    weight[rows] *= 100
    source.set_weight(grown.weight, MemoryWeight(weight))

    def peak(view: View) -> float:
        weight = weights(view)[grown.name]
        return float(weight.abs().max() / weight.square().mean().sqrt())

    rotated = gw.optimize(source, f"rotate{{{other}=false}}", samples=[small.inputs]).graph
    assert peak(rotated) < 0.6 * peak(source)


@pytest.mark.parametrize("behind", ["gptq{bits=2 group=16}", "quantize{bits=2 group=16}",
                                    "awq{bits=2 group=16}"])  # fmt: skip
@pytest.mark.parametrize("propagate", ["dense", "compensated"])
def test_gaps_are_those_in_the_new_basis(behind: str, propagate: str, models: Any) -> None:
    _, views = models["llama"]
    rng = torch.Generator().manual_seed(5)
    batch = {"input_ids": torch.randint(0, 97, (8, 9), generator=rng),
             "attention_mask": torch.ones(8, 9, dtype=torch.int64)}  # fmt: skip
    recipe = f"rotate,{behind},eora{{rank=64 factors=float32 propagate={propagate}}}"
    repaired = gw.optimize(views["fx"], recipe, samples=[batch], calibration=[batch]).graph
    assert rel(sweep(views["fx"], batch), sweep(repaired, batch)) < 1e-4


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REFUSED)
def test_a_stream_that_cannot_be_rotated(family: str) -> None:
    small = BUILDERS[family](layers=1)
    source = traced(small)
    (step,) = gw.optimize(source, "rotate", samples=[small.inputs]).report.passes
    assert step.result.refused == [("residual stream", REFUSED[family])]
    assert {site.kind for site in step.result.sites} <= {"v", "qkv", "o"}, "heads are"
    for difference in step.errors.values():
        assert difference.rel_l2 < 2e-6
    with pytest.raises(BadInput, match="rotate found nothing to do"):
        gw.plan(source, "rotate{heads=false}")


def test_a_layer_norm_subtracts_the_mean() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8)
            self.qkv, self.o = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
            self.last, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 9)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.o(y.transpose(1, 2).flatten(2))
            return self.head(self.last(x))

    view = trace(Plain(), (), {"ids": torch.zeros(1, 3, dtype=torch.int64)})
    with pytest.raises(BadInput, match="it subtracts the mean, which no rotation keeps"):
        gw.plan(view, "rotate{heads=false}")


def test_nothing_is_asked_for() -> None:
    with pytest.raises(BadInput, match="there is nothing to rotate"):
        gw.passes.Rotate(stream=False, heads=False)


def test_behind_codes(models: Any) -> None:
    small, views = models["llama"]
    with pytest.raises(BadInput, match=r"residual stream: the weight of .*q_proj is not"):
        gw.optimize(views["fx"], "quantize,rotate", samples=[small.inputs])
