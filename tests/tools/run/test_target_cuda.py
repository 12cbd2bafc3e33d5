"""Runs for a GPU: the float that is taken, what is said, and that they can be repeated."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx_ir
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.evaluate.task import silent
from graphwright.tools.report import manifest
from graphwright.tools.report.manifest import Manifest
from graphwright.tools.run import pipeline, replay, verifying


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(source: Path, out: Path, dtype: str = "") -> Manifest:
    recipe = gw.Recipe.parse("quantize{bits=4 group=32}")
    return pipeline.run(
        pipeline.Request(str(source), recipe, out, target="cuda", dtype=dtype), silent
    )


def floats(out: Path) -> set[onnx_ir.DataType | None]:
    """Of the cache, and of the scales of linears."""
    graph = onnx_ir.load(out / "model.onnx").graph
    scales = {n.inputs[2] for n in graph if n.op_type == "MatMulNBits"}
    return {value.dtype for value in (*graph.inputs[2:], *scales) if value is not None}


def test_float32_is_taken_in_what_the_target_prefers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype | None] = []

    def load(*args: Any, **options: Any) -> Any:
        dtypes.append(options["dtype"])
        return gw.load(*args, **options)

    monkeypatch.setattr(pipeline, "load", load)
    done = run(source, tmp_path / "out")
    assert dtypes == [torch.float16]  # it is loaded once
    assert any("taken in fp16, which target cuda prefers" in n for n in done.source.notes)
    assert done.recipe == "quantize{bits=4 group=32 accuracy_level=0}" and done.dtype == ""
    assert any("padding goes behind a text" in note for note in done.notes)
    assert floats(tmp_path / "out") == {onnx_ir.DataType.FLOAT16}
    view = gw.load(tmp_path / "out")
    canonicalize(view)
    # Queries, keys and values are one product in the file, and three again where it is read.
    parts = {linear.name.rpartition(".")[2] for linear in recognize(view).linears}
    assert parts >= {"q_proj", "k_proj", "v_proj", "o_proj"} and not any("+" in p for p in parts)


def test_the_float_that_was_asked_for_is_repeated(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "out", "bf16")
    assert floats(tmp_path / "out") == {onnx_ir.DataType.BFLOAT16}
    error = done.verification.runtime.optimized
    assert error is not None and 0 < (error.rel_l2 or 0) < 4e-2
    assert done.dtype == "bf16" and verifying.WIDENED in done.notes
    with pytest.raises(BadInput, match="does not load it"):
        gw.compile(tmp_path / "out")
    replay.replay(tmp_path / "out", tmp_path / "again", silent)


def test_a_file_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    recipe = gw.Recipe.parse("clean")
    request = pipeline.Request(
        str(tmp_path / "model.onnx"), recipe, None, target="cuda", dtype="fp16"
    )
    with pytest.raises(BadInput, match="dtype is for zoo and Hugging Face models"):
        pipeline.run(request, silent)


@pytest.mark.parametrize(
    ("dtype", "target", "said"),
    [(None, "cuda", "fp32"), ("float16", "cpu", "fp16")],
)
def test_what_was_exported_in_python_is_repeated_in_its_float(
    source: Path, tmp_path: Path, dtype: str | None, target: str, said: str
) -> None:
    """Not in that which the target prefers, nor in the source's own."""
    done = gw.optimize(gw.load(source, dtype=dtype), "magnitude")
    out = gw.export(done.graph, tmp_path / "out", report=done.report, target=target)
    assert manifest.load(out).dtype == said
    assert replay.replay(out, None, silent)["identical"]


def test_what_was_exported_in_f64_is_not_repeated_as_another_model(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "out")
    path = tmp_path / "out" / "graphwright.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "fp64"}))
    with pytest.raises(BadInput, match="taken in fp64, which ONNX Runtime computes in part"):
        replay.replay(tmp_path / "out", None, silent)
