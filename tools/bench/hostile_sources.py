"""The valid files that a campaign starts from, and whether a result is that of its source."""

from __future__ import annotations

import importlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

SEED = 0
WRONG = {"clean": 2e-3, "quantize": 0.25}
"""Relative L2 to the source above which a result is wrong, by the first pass of its recipe."""


def write_all(folder: Path) -> None:
    """``m.onnx``, ``outside.onnx`` with its data beside it, ``attention.onnx``, ``m.pt2``,
    ``llama/`` and ``data.npz``: small, random, valid."""
    torch.manual_seed(SEED)
    _onnx(folder)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    rows = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module.eval(), (torch.randn(3, 64),), dynamic_shapes=rows)
    torch.export.save(program, folder / "m.pt2")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=80, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    np.savez(folder / "data.npz", x=np.random.default_rng(SEED).standard_normal((20, 64), "f4"))


def _onnx(folder: Path) -> None:
    onnx: Any = importlib.import_module("onnx")
    h, nh, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    draw = np.random.default_rng(SEED)

    def const(name: str, *shape: int) -> Any:
        return nh.from_array((draw.standard_normal(shape) * 0.2).astype(np.float32), name)

    def model(nodes: list[Any], weights: list[Any], inner: list[Any]) -> Any:
        ends = [h.make_tensor_value_info(n, kind.FLOAT, s) for n, s in (("x", inner), ("y", None))]
        graph = h.make_graph(nodes, "g", [ends[0]], [ends[1]], weights)
        return h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)

    plain = model(
        [h.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="first"),
         h.make_node("Relu", ["h"], ["r"]), h.make_node("MatMul", ["r", "v"], ["y"], name="last")],
        [const("w", 96, 64), const("b", 96), const("v", 96, 32)], ["rows", 64],
    )  # fmt: skip
    onnx.save(plain, folder / "m.onnx")
    onnx.save(
        plain, folder / "outside.onnx", save_as_external_data=True, location="outside.data",
        size_threshold=0,
    )  # fmt: skip
    heads = nh.from_array(np.array([0, 0, 4, 8]), "heads")
    joined = nh.from_array(np.array([0, 0, 32]), "joined")
    nodes = []
    for name in "qkv":
        turned = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes += [
            h.make_node("MatMul", ["n", f"w{name}"], [name], name=f"attn.{name}"),
            h.make_node("Reshape", [name, "heads"], [f"{name}4"]),
            h.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=turned),
        ]
    attention = model(
        [h.make_node("LayerNormalization", ["x", "g", "c"], ["n"], axis=-1), *nodes,
         h.make_node("MatMul", ["qt", "kt"], ["s"]), h.make_node("Div", ["s", "scale"], ["d"]),
         h.make_node("Softmax", ["d"], ["p"], axis=-1), h.make_node("MatMul", ["p", "vt"], ["a"]),
         h.make_node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]),
         h.make_node("Reshape", ["at", "joined"], ["j"]), h.make_node("MatMul", ["j", "wo"], ["o"]),
         h.make_node("Add", ["x", "o"], ["y"])],
        [heads, joined, nh.from_array(np.float32(8**0.5), "scale"), const("g", 32), const("c", 32),
         *(const(f"w{n}", 32, 32) for n in "qkvo")], ["rows", "length", 32],
    )  # fmt: skip
    onnx.save(attention, folder / "attention.onnx")


def wrong(source: Path, artifact: Path, bound: float) -> str:
    """How the artifact in ONNX Runtime differs from the source in its own library; empty where it
    does not, or where that library refuses the source."""
    try:
        inputs, expected = _reference(source)
    except Exception:
        return ""
    outputs = _session_outputs(artifact, inputs)
    for name, want in expected.items():
        # A program's output has no name of its own. A config may name another head.
        got = next(iter(outputs.values())) if source.suffix == ".pt2" else outputs.get(name)
        if got is None:
            return f"there is no output {name}" if source.suffix == ".onnx" else ""
        if got.shape != want.shape:
            return f"output {name} is {got.shape}, not {want.shape}"
        if not np.isfinite(want).all():
            continue
        wide = want.astype(np.float64)  # in float32 the squares of damaged weights overflow
        distance = float(np.linalg.norm(got - wide) / max(float(np.linalg.norm(wide)), 1e-6))
        if not distance <= bound:
            return f"output {name} is {distance:.3g} (relative L2) from the source"
    return ""


def _reference(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if source.suffix == ".onnx":
        inputs = _random_inputs(source)
        return inputs, _session_outputs(source, inputs)
    draw = np.random.default_rng(1)
    if source.suffix == ".pt2":
        x = draw.standard_normal((3, 64), "f4")
        module = torch.export.load(source).module()
        return {"input": x}, {"y": module(torch.from_numpy(x)).detach().numpy()}
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = draw.integers(0, 80, (2, 5))
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, {"logits": logits.numpy()}


def _session(path: Path) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _random_inputs(path: Path) -> dict[str, Any]:
    rng, draw = Random(SEED), np.random.default_rng(SEED)
    sizes: dict[str, int] = {}
    inputs = {}
    for declared in _session(path).get_inputs():
        shape = [d if isinstance(d, int) else sizes.setdefault(str(d), rng.randint(2, 5))
                 for d in declared.shape]  # fmt: skip
        if declared.type != "tensor(float)" or np.prod(shape) > 1e6:
            raise ValueError("an input that is not drawn")
        inputs[declared.name] = draw.standard_normal(shape, "f4")
    return inputs


def _session_outputs(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    session = _session(path)
    empty = {
        i.name: np.zeros([d if isinstance(d, int) else 0 for d in i.shape], np.float32)
        for i in session.get_inputs() if i.name not in inputs
    }  # fmt: skip
    rows = len(next(iter(inputs.values()))) if inputs else 0
    past = {n: np.zeros((rows, *v.shape[1:]), np.float32) for n, v in empty.items()}
    names = [o.name for o in session.get_outputs()]
    taken = {i.name for i in session.get_inputs()}
    feeds = {n: v for n, v in (inputs | past).items() if n in taken}
    return dict(zip(names, session.run(names, feeds), strict=True))
