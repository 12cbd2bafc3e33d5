"""Half precision, in which most checkpoints are published: its artifacts run in ONNX Runtime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends import compile as compile_graph
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import ROUNDED_REL_L2, compare, exact_tolerance, tolerance
from graphwright.tools.evaluate.task import silent
from graphwright.tools.run import pipeline

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
RECIPE = "quantize{bits=4 group=32 exclude=lm_head},eora{rank=4}"
IDS = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=HALVES)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a random Llama in a half type, with calibration data; the type."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    dtype = HALVES[request.param]
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    ones = np.ones(IDS.shape, dtype=np.int64)
    np.savez(folder / "calib.npz", input_ids=IDS.numpy(), attention_mask=ones)
    return folder, dtype


def test_the_artifact_of_a_half_precision_checkpoint_runs(
    half: tuple[Path, torch.dtype], tmp_path: Path
) -> None:
    folder, dtype = half
    request = pipeline.Request(
        str(folder), gw.Recipe.parse(RECIPE), tmp_path / "out",
        calibration=str(folder / "calib.npz"),
    )  # fmt: skip
    done = pipeline.run(request, silent)
    runtime = done.verification.runtime
    # Optimised it rounds activations to 8 bits, which turn here and there.
    bounds = {"optimized": ROUNDED_REL_L2, "unoptimized": exact_tolerance(dtype)}
    for name, bound in bounds.items():
        error = getattr(runtime, name)
        assert error.rel_l2 is not None and 0 < error.rel_l2 < bound
    inputs = {"input_ids": IDS[:2], "attention_mask": torch.ones_like(IDS[:2])}
    source = gw.load(folder, cache=False)
    assert tolerance(source) == exact_tolerance(dtype)
    expected = sweep(source, inputs)["logits"]
    actual = compile_graph(tmp_path / "out")(**inputs)["logits"]
    assert actual.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert compare({"y": expected}, {"y": actual})["y"].rel_l2 < 0.3


def test_inputs_of_a_bfloat16_graph_are_taken_as_they_are(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 123))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight).to(torch.bfloat16).float().sigmoid()

    torch.manual_seed(0)
    x = torch.randn(3, 123).bfloat16()
    graph = gw.trace(Module().bfloat16(), (x,))
    out = gw.export(graph, tmp_path / "out")
    weight = next(w for w in gw.load(out).weights().values() if w.numel == 5 * 123)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.read().bfloat16().float(), weight.read())
    (expected,) = sweep(graph, {"x": x}).values()
    for optimized in (True, False):
        (actual,) = compile_graph(out, optimize=optimized)(x).values()
        assert compare({"y": expected}, {"y": actual})["y"].rel_l2 < exact_tolerance(torch.bfloat16)


def test_a_half_precision_model_of_the_zoo_has_samples_that_fit() -> None:
    graph = gw.load("zoo:tiny-vit", dtype=torch.bfloat16)
    assert graph.source.samples[0]["pixel_values"].dtype == torch.bfloat16
    report = gw.optimize(graph, "quantize{bits=8}").report
    assert 0 < report.errors["logits"].rel_l2 < 0.1


def test_a_half_precision_model_in_eight_bits_is_no_false_alarm(tmp_path: Path) -> None:
    """ONNX Runtime rounds its activations wrongly with optimisation off: it is not made to."""
    graph = gw.load("zoo:tiny-vit", dtype=torch.float16)
    result = gw.optimize(graph, "quantize{bits=8 group=32 accuracy_level=4}")
    batch = graph.source.samples[0]
    expected = sweep(result.graph, batch)
    out = gw.export(result.graph, tmp_path / "out")
    for optimized in (True, False):
        outputs = compile_graph(out, optimize=optimized, lean=not optimized)(**batch)
        assert compare(expected, outputs)["logits"].rel_l2 < 0.03
