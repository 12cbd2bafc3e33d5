"""A fusion that is a little wrong shows where arithmetic is coarse, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphwright.backends.artifacts.optimization import float_twin
from graphwright.backends.runtimes.onnxruntime import _WEIGHTS_FOLDER
from graphwright.ir.core.errors import BoundExceeded
from graphwright.ir.core.view import View
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.down(torch.relu(4 * self.up(x))))
        return out


def traced(dtype: torch.dtype, recipe: str = "clean{optional=true}") -> View:
    torch.manual_seed(1)
    graph = gw.trace(Net().to(dtype), (torch.randn(3, 32, dtype=dtype),))
    return gw.optimize(graph, recipe).graph


def rounded_file(path: Path, product: str = "MatMul") -> Path:
    """Codes of 8 bits are multiplied: in QDQ form, or by ``MatMulInteger``."""
    draw = np.random.default_rng(0)
    codes = numpy_helper.from_array(draw.integers(-9, 9, (32, 16), np.int8), "codes")
    scale = numpy_helper.from_array(np.array(0.02, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(3, np.int8), "zero")
    rounding = [node("QuantizeLinear", ["x", "scale", "zero"], ["xq"])]
    if product == "MatMul":
        rounding += [
            node("DequantizeLinear", ["xq", "scale", "zero"], ["xr"]),
            node("DequantizeLinear", ["codes", "scale"], ["w"]), node(product, ["xr", "w"], ["h"]),
        ]  # fmt: skip
    else:
        rounding += [
            node(product, ["xq", "codes", "zero"], ["sums"]),
            node("Cast", ["sums"], ["wide"], to=TensorProto.FLOAT),
            node("Mul", ["wide", "scale"], ["h"]),
        ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
            for name, size in (("x", 32), ("y", 16))]  # fmt: skip
    ones = numpy_helper.from_array(np.ones(16, np.float32), "ones")
    norm = node("LayerNormalization", ["h", "ones"], ["y"], epsilon=1e-5)
    tensors = [codes, scale, zero, ones]
    graph = helper.make_graph([*rounding, norm], "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


class WrongFusion(ort.InferenceSession):  # type: ignore[misc, no-any-unimported]
    """Optimised sessions take another epsilon for that of a norm: .001 of its output."""

    def __init__(self, model: Path | bytes, options: Any, **more: Any) -> None:
        if options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL:
            if isinstance(model, Path):
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(model.absolute().parent))
                model = onnx.load(model, load_external_data=False).SerializeToString()
            proto = onnx.load_from_string(model)
            (norm,) = (one for one in proto.graph.node if one.op_type == "LayerNormalization")
            (epsilon,) = (one for one in norm.attribute if one.name == "epsilon")
            epsilon.f = 0.002
            model = proto.SerializeToString()
        super().__init__(model, options, **more)


@pytest.mark.parametrize("kind", ["level 4", "float16", "bfloat16", "float16 at level 4", "QDQ"])
def test_what_optimisation_alone_changes_is_judged_as_in_float32(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = "quantize{bits=8 group=32 accuracy_level=4}"
    graph = {
        "level 4": lambda: traced(torch.float32, level),
        "float16": lambda: traced(torch.float16),
        "bfloat16": lambda: traced(torch.bfloat16),
        "float16 at level 4": lambda: traced(torch.float16, level),
        "QDQ": lambda: gw.load(rounded_file(tmp_path / "m.onnx")),
    }[kind]()
    out = gw.export(graph, tmp_path / "out")
    runtime = json.loads((out / "graphwright.json").read_text())["verification"]["runtime"]
    assert runtime["optimization"]["rel_l2"] < 2e-6
    monkeypatch.setattr(ort, "InferenceSession", WrongFusion)
    alone = r"graph optimisation alone moves the output \w+ by 0\.00\d+ .* in float32 and without"
    with pytest.raises(BoundExceeded, match=alone):
        gw.export(graph, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_where_nothing_is_coarse_there_is_no_further_run(tmp_path: Path) -> None:
    out = gw.export(traced(torch.float32), tmp_path / "out")
    runtime = json.loads((out / "graphwright.json").read_text())["verification"]["runtime"]
    assert set(runtime) == {"optimized", "unoptimized"}


def test_what_cannot_but_round_has_no_twin(tmp_path: Path) -> None:
    assert float_twin(rounded_file(tmp_path / "m.onnx", "MatMulInteger")) is None
    twin = onnx.load_from_string(float_twin(rounded_file(tmp_path / "m.onnx")) or b"")
    kinds = [one.op_type for one in twin.graph.node]
    assert kinds == ["Identity", "DequantizeLinear", "MatMul", "LayerNormalization"]
