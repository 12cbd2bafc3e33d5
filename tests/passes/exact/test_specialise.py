"""Special cases of a model: what remains is the model's own, and what nothing asks for is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor

KINDS = ("fx", "onnx")
WORDS, WIDTH, CLASSES = 11, 8, 3


class Towers(torch.nn.Module):
    """Pictures against class prompts, as CLIP has them, and how warm it is."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = torch.nn.Sequential(
            torch.nn.Linear(6, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH)
        )
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.text = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor, prompts: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        text = torch.relu(self.text(self.words(prompts).mean(1)))
        picture = self.picture(pixels + kinds.float())
        return picture @ text.T, text.transpose(0, 1)


@pytest.fixture(scope="module")
def towers() -> tuple[Towers, dict[str, View], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Towers().eval()
    inputs = {
        "pixels": torch.randn(2, 6), "prompts": torch.randint(0, WORDS, (CLASSES, 4)),
        "kinds": torch.ones(2, 6, dtype=torch.int64),
    }  # fmt: skip
    batch, classes = torch.export.Dim("batch"), torch.export.Dim("classes")
    shapes = {"pixels": {0: batch}, "prompts": {0: classes}, "kinds": {0: batch}}
    fx = trace(model, kwargs=inputs, dynamic_shapes=shapes)
    return model, {"fx": fx, "onnx": translated(fx)}, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_input_takes_its_tower_along(towers: Any, kind: str, tmp_path: Path) -> None:
    model, graphs, inputs = towers
    prompts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    np.save(tmp_path / "prompts.npy", prompts.numpy())
    recipe = f"bind{{input=prompts value={tmp_path}/prompts.npy}},bind{{input=kinds value=0}},clean"
    done = gw.optimize(graphs[kind], recipe, samples=[inputs])
    assert done.graph.input_names() == ("pixels",)
    gone = {"words.weight", "text.weight", "text.bias"}
    assert gone <= set(graphs[kind].weights()) and not gone & set(done.graph.weights())
    with torch.no_grad():
        expected = model(inputs["pixels"], prompts, torch.zeros(2, 6, dtype=torch.int64))
    run = gw.compile(done.graph, backend="onnxruntime")
    for outputs in (sweep(done.graph, {"pixels": inputs["pixels"]}), run(pixels=inputs["pixels"])):
        for actual, tensor in zip(outputs.values(), expected, strict=True):
            torch.testing.assert_close(actual, tensor)
    first, *_ = done.report.passes
    assert first.bytes_after < first.bytes_before
    assert max(error.rel_l2 for step in done.report.passes for error in step.errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bind{input=prompt value=0}", "there is no input prompt; did you mean prompts"),
        ("bind{input=prompts value=1,2,3}", r"prompts is i64\[classes, 4\], and the value is i64"),
        ("bind{input=prompts value=0}", "one number does not say how long"),
        ("bind{input=prompts value=x}", "no FILE.npy, and no numbers"),
        ("bind{input=prompts value=no.npy}", "No such file"),
        ("bind{input=pixels value=FILE}", "batch is a size of pixels and of kinds"),
        ("quantize{bits=8 group=0},bind{input=kinds value=0}", "put bind first"),
        ("restrict-head{tokens=[1]}", "the graph has no linears from the stream to words"),
        ("restrict-head{tokens=[]}", "tokens is empty"),
    ],
)
def test_bad_input(towers: Any, recipe: str, message: str, tmp_path: Path) -> None:
    _, graphs, inputs = towers
    np.save(tmp_path / "two.npy", np.zeros((2, 6), np.float32))
    with pytest.raises(BadInput, match=message):
        gw.optimize(graphs["fx"], recipe.replace("FILE", f"{tmp_path}/two.npy"), samples=[inputs])
