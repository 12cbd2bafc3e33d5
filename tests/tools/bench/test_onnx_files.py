"""What becomes of ONNX files, on two that are small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.tools.bench import onnx_files
from onnx import TensorProto, helper


def _save(path: Path, first: onnx.NodeProto) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [first, helper.make_node("MatMul", ["t", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 32])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_files_are_judged_in_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "good.onnx", helper.make_node("Softplus", ["x"], ["t"]))
    _save(tmp_path / "noisy.onnx", helper.make_node("RandomNormalLike", ["x"], ["t"], name="n"))
    monkeypatch.delitem(onnx_files.RECIPES, "clean")
    judged = {}
    judge = onnx_files.judge

    def noted(path: Path, recipe: str, name: str) -> onnx_files.Outcome:
        judged[name] = judge(path, recipe, name)
        return judged[name]

    monkeypatch.setattr(onnx_files, "judge", noted)
    assert onnx_files.main([str(tmp_path)]) == 0
    good, noisy = judged["good.onnx"], judged["noisy.onnx"]
    assert (good.code, good.sites) == (0, 1)
    assert good.error is not None
    assert 1e-4 < good.error < 0.02
    assert noisy.code == 2
    assert "n (ai.onnx::RandomNormalLike) gives other numbers at each run" in noisy.words
    assert "2 files, ended with 0: quantize 1" in capsys.readouterr().out
