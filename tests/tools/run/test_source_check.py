"""The source is the truth: a reading that is wrong is caught before anything is published."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import onnx
import pytest
import torch
from graphwright.backends.runtimes.original import OnnxOriginal
from graphwright.ir.core.errors import BadInput, BoundExceeded, InvalidGraph
from graphwright.ir.core.view import Run, View
from graphwright.ir.fx.view import FxView
from graphwright.ir.onnx.view import OnnxView
from graphwright.tools.evaluate.task import silent
from graphwright.tools.run import pipeline
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
RNG = np.random.default_rng(0)


def numbers(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array((RNG.standard_normal(shape) * 0.3).astype(np.float32), name)


def whole(name: str, *values: int, dtype: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def file(
    path: Path, nodes: list[Any], tensors: list[Any], shape: tuple[Any, ...], *, opset: int = 18,
    external: bool = False,
) -> str:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    target = path / "model.onnx"
    onnx.save(model, target, save_as_external_data=external, size_threshold=0)
    return str(target)


def mlp(path: Path, **how: Any) -> str:
    nodes = [
        node("Gemm", ["x", "w1", "b"], ["h"], name="up"), node("Relu", ["h"], ["r"], name="act"),
        node("MatMul", ["r", "w2"], ["y"], name="down"),
    ]  # fmt: skip
    tensors = [numbers("w1", 32, 12), numbers("b", 12), numbers("w2", 12, 5)]
    return file(path, nodes, tensors, ("n", 32), **how)


def convolutions(path: Path) -> str:
    nodes = [
        node("Conv", ["x", "k"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], ["g"], name="mean"),
        node("Flatten", ["g"], ["y"], name="flat"),
    ]
    return file(path, nodes, [numbers("k", 4, 3, 3, 3)], ("n", 3, 8, 8))


def attention(path: Path) -> str:
    nodes = [
        node("LayerNormalization", ["x", "s"], ["n"], name="norm", axis=-1),
        node("MatMul", ["n", "wq"], ["q"], name="q"), node("MatMul", ["n", "wk"], ["k"], name="k"),
        node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["l"], name="logits"),
        node("Softmax", ["l"], ["a"], name="weights", axis=-1),
        node("MatMul", ["a", "n"], ["y"], name="mix"),
    ]  # fmt: skip
    tensors = [numbers("s", 8), numbers("wq", 8, 8), numbers("wk", 8, 8)]
    return file(path, nodes, tensors, ("n", "t", 8))


def recurrent(path: Path) -> str:
    nodes = [
        node("LSTM", ["x", "w", "r"], ["all", "last"], name="lstm", hidden_size=4),
        node("Squeeze", ["last", "zero"], ["y"], name="squeeze"),
    ]
    tensors = [numbers("w", 1, 16, 8), numbers("r", 1, 16, 4), whole("zero", 0)]
    return file(path, nodes, tensors, (6, "n", 8))


def stored(path: Path) -> str:
    """Weights in 8 bits, widened in the graph."""
    codes = numpy_helper.from_array(RNG.integers(-99, 99, (8, 12), dtype=np.int8), "codes")
    nodes = [
        node("DequantizeLinear", ["codes", "scale"], ["w"], name="widen"),
        node("MatMul", ["x", "w"], ["h"], name="up"), node("Tanh", ["h"], ["y"], name="act"),
    ]  # fmt: skip
    scale = numpy_helper.from_array(np.array(0.01, np.float32), "scale")
    return file(path, nodes, [codes, scale], ("n", 8), opset=21)


def branches(path: Path) -> str:
    """A graph within the graph."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node(op, ["h"], [name])], name, [], [out])

    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="up"),
        node("ReduceMax", ["h"], ["most"], name="most", keepdims=0),
        node("Greater", ["most", "least"], ["c"], name="large"),
        node("If", ["c"], ["y"], name="choose", then_branch=branch("t", "Tanh"),
             else_branch=branch("e", "Neg")),
    ]  # fmt: skip
    least = numpy_helper.from_array(np.array(0.0, np.float32), "least")
    return file(path, nodes, [numbers("w", 8, 12), least], ("n", 8))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(32, 12), torch.nn.Linear(12, 32)
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        inner = self.down(torch.nn.functional.gelu(self.up(x)))
        return {"y": self.norm(x + inner), "inner": inner}


class Attending(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def net() -> tuple[Any, ...]:
    return Net(), (torch.randn(2, 32),)


def attending() -> tuple[Any, ...]:
    inputs = {"x": torch.randn(2, 5, 16), "mask": torch.zeros(5, 5)}
    batch, none = {0: torch.export.Dim("batch")}, None
    return Attending(), (), inputs, {"x": batch, "mask": none}


def program(path: Path, make: Callable[[], tuple[Any, ...]]) -> str:
    module, args, kwargs, shapes = (*make(), {}, None)[:4]
    batch = ({0: torch.export.Dim("batch")},) if shapes is None else shapes
    exported = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=batch)
    torch.export.save(exported, path / "model.pt2")
    return str(path / "model.pt2")


def folder(
    path: Path, kind: str, dtype: torch.dtype = torch.float32, *, layers: int = 1
) -> str:
    """A folder that transformers wrote, of a small model with random weights."""
    from transformers import (
        BertConfig,
        GPT2Config,
        LlamaConfig,
        Qwen2Config,
        ViTConfig,
    )

    transformers: Any = importlib.import_module("transformers")
    text = {"vocab_size": 97, "num_attention_heads": 4, "hidden_size": 32}
    sizes = {"intermediate_size": 48, "num_hidden_layers": layers, **text}
    config, name = {
        "llama": (LlamaConfig(**sizes, num_key_value_heads=2), "LlamaForCausalLM"),
        "qwen2": (Qwen2Config(**sizes, num_key_value_heads=2), "Qwen2ForCausalLM"),
        "gpt2": (GPT2Config(vocab_size=97, n_embd=32, n_head=4, n_layer=layers), "GPT2LMHeadModel"),
        "bert": (BertConfig(**sizes), "BertModel"),
        "vit": (ViTConfig(**sizes, image_size=16, patch_size=8), "ViTModel"),
    }[kind]
    torch.manual_seed(0)
    getattr(transformers, name)(config).to(dtype).save_pretrained(path)
    return str(path)


# --- what is wrong with the reading ---------------------------------------------------------------


def wrong_value(monkeypatch: pytest.MonkeyPatch, name: str, rows: int | None = None) -> None:
    """Nodes of this name, or of this op in this module, give another value; with ``rows``, only
    where it has as many."""

    def breaking(whole: Callable[..., Any]) -> Callable[..., Any]:
        def execute(self: View, node: Any, args: Any) -> tuple[Any, ...]:
            results = whole(self, node, args)
            # In the vocabulary's words a node bears the name of the one that it replaces.
            known = {self.name(node).split("/")[0], f"{self.op(node)} in {self.scope(node)}"}
            if name not in known or rows not in (None, len(results[0])):
                return tuple(results)
            return tuple(result * 1.5 + 0.5 for result in results)

        return execute

    for view in (FxView, OnnxView):
        monkeypatch.setattr(view, "execute", breaking(view.execute))


def wrong_weight(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The numbers of one weight come in another order."""
    module: Any = importlib.import_module("graphwright.ir.run.sweep")
    right = module._weight

    def read(view: View, value: Any) -> torch.Tensor:
        tensor: torch.Tensor = right(view, value)
        named = getattr(value, "meta", {}).get("weight", view.name(value))
        if named.removesuffix(".T") != name:
            return tensor
        return tensor.flip(-1 if named.endswith(".T") else 0)

    monkeypatch.setattr(module, "_weight", read)


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], str]
    break_: Callable[..., None]
    what: str
    """The node or weight that is read wrongly."""
    named: str
    """What the message must name."""
    rows: int | None = None
    cache: bool | None = None


CASES = {
    "onnx, a linear": Case(mlp, wrong_value, "up", "node up (Gemm)"),
    "onnx, a weight": Case(mlp, wrong_weight, "w2", "node down (MatMul)"),
    "onnx, weights beside it": Case(
        lambda p: mlp(p, external=True), wrong_weight, "w1", "node up (Gemm)"
    ),
    "onnx, an old opset": Case(
        lambda p: mlp(p, opset=13), wrong_value, "act", "node act (Relu)"
    ),
    "onnx, convolutions": Case(convolutions, wrong_value, "pool", "node pool (MaxPool)"),
    "onnx, attention": Case(attention, wrong_value, "mix", "node mix (MatMul)"),
    "onnx, a norm": Case(attention, wrong_value, "norm", "node norm (LayerNormalization)"),
    "onnx, recurrent": Case(recurrent, wrong_value, "lstm", "node lstm (LSTM)"),
    "onnx, stored weights": Case(stored, wrong_value, "widen", "node widen (DequantizeLinear)"),
    "onnx, a branch": Case(branches, wrong_value, "choose", "node choose (If)"),
    "onnx, other sizes": Case(mlp, wrong_value, "down", "node down (MatMul)", rows=3),
    "zoo": Case(
        lambda _: "zoo:tiny-vit", wrong_value, "layer_norm in vit.layernorm",
        "in vit.layernorm)",
    ),
    "folder, a decoder": Case(
        lambda p: folder(p, "llama"), wrong_weight, "model.layers.0.mlp.down_proj.weight",
        "in model.layers.0.mlp.down_proj)", cache=False,
    ),
    "folder, a decoder with its cache": Case(
        lambda p: folder(p, "llama", layers=2), wrong_value,
        "linear in model.layers.1.self_attn.v_proj",
        "in model.layers.1.self_attn.v_proj)", cache=True,
    ),
    "folder, padding": Case(
        lambda p: folder(p, "gpt2"), wrong_value, "embedding in transformer.wpe",
        "in transformer.wpe)", rows=3, cache=True,
    ),
    "folder, half precision": Case(
        lambda p: folder(p, "qwen2", torch.bfloat16), wrong_weight,
        "model.layers.0.mlp.up_proj.weight", "in model.layers.0.mlp.up_proj)", cache=False,
    ),
    "folder, an encoder": Case(
        lambda p: folder(p, "bert"), wrong_value,
        "layer_norm in encoder.layer.0.attention.output.LayerNorm",
        "in encoder.layer.0.attention.output.LayerNorm)",
    ),
    "folder, images": Case(
        lambda p: folder(p, "vit"), wrong_value, "layer_norm in layernorm", "in layernorm)"
    ),
    "factory": Case(lambda _: f"{__name__}:net", wrong_weight, "down.weight", "in down)"),
    "factory, given shapes": Case(
        lambda _: f"{__name__}:attending", wrong_value, "linear in qkv", "in qkv)"
    ),
    "pt2": Case(lambda p: program(p, net), wrong_weight, "up.weight", "in up)"),
    "pt2, attention": Case(
        lambda p: program(p, attending), wrong_value, "linear in out", "in out)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_wrong_reading_is_caught_before_anything_is_published(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    model = case.make(folder)
    rows = {} if case.rows is None else {"rows": case.rows}
    case.break_(monkeypatch, case.what, **rows)
    recipe = gw.Recipe.parse("clean{optional=true}")
    request = pipeline.Request(model, recipe, tmp_path / "out", cache=case.cache)
    with pytest.raises(BoundExceeded) as caught:
        pipeline.run(request, silent)
    assert "differs from the source" in str(caught.value)
    assert case.named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_reading_of_a_module_is_caught_by_optimize(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, args = net()
    graph = gw.trace(module, args)
    wrong_weight(monkeypatch, "down.weight")
    with pytest.raises(BoundExceeded, match=r"the module Net gives.* in down\)"):
        gw.optimize(graph, "clean{optional=true}")


def test_a_wrong_reading_of_a_file_is_caught_by_optimize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = gw.load(mlp(tmp_path))
    wrong_value(monkeypatch, "act")
    with pytest.raises(BoundExceeded, match=r"ONNX Runtime .* gives.* node act \(Relu\)"):
        gw.optimize(graph, "clean{optional=true}")


def test_a_reading_that_fails_on_what_the_source_takes_is_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = gw.trace(*net())
    whole = FxView.execute

    def fixed(self: FxView, node: Any, args: Any) -> tuple[Any, ...]:
        return tuple(result.reshape(2, -1) for result in whole(self, node, args))

    monkeypatch.setattr(FxView, "execute", fixed)
    with pytest.raises(BoundExceeded, match=r"fails on an input of 3 x 32, which the module Net"):
        gw.optimize(graph, "clean{optional=true}")


def test_sizes_that_the_source_refuses_are_told() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_exporting() and len(x) != 2:
                raise ValueError("two rows, please")
            return x * 2

    report = gw.optimize(gw.trace(Two(), (torch.randn(2, 5),)), "clean{optional=true}").report
    assert report.truth["probes"] == [] and "two rows, please" in report.truth["unheard"]


def test_samples_that_the_source_refuses_are_an_error_that_says_what_to_give(
    tmp_path: Path,
) -> None:
    nodes = [
        node("Pad", ["x", "ends"], ["p"], name="pad", mode="reflect"),
        node("Relu", ["p"], ["y"], name="act"),
    ]
    model = file(tmp_path, nodes, [whole("ends", 0, 20, 0, 20)], ("n", "samples"))
    message = (
        r"Pad.*: x \[2, 12\]\. Give others that the model takes by --calib DATA .*, a \.npz of "
        r"x f32\[n, samples\]"
    )
    with pytest.raises(BadInput, match=message):
        gw.optimize(gw.load(model), "clean{optional=true}")


def test_a_source_that_contradicts_itself_is_the_files_fault(tmp_path: Path) -> None:
    """Gemm takes two dimensions. Read as a linear it takes three, and then the output is wrong."""
    path = mlp(tmp_path)
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [2, 3, 32]))
    onnx.save(model, path)
    graph = gw.load(path)
    with pytest.raises(BadInput, match=r"model\.onnx contradicts itself: down.*ONNX Runtime does"):
        gw.optimize(graph, "clean{optional=true}")
    graph.source.original = None
    with pytest.raises(InvalidGraph, match=r"down.* the graph says"):
        gw.optimize(graph, "clean{optional=true}", samples=[{"x": torch.ones(2, 3, 32)}])


def test_a_loop_without_an_end_is_not_run_by_the_source_either(tmp_path: Path) -> None:
    kinds = {"i": TensorProto.INT64, "c": TensorProto.BOOL, "v": TensorProto.FLOAT}
    ends = [helper.make_tensor_value_info(n, kind, None) for n, kind in kinds.items()]
    results = [helper.make_tensor_value_info(new, kinds[old], None) for new, old in ("dc", "wv")]
    turns = [node("Identity", ["c"], ["d"]), node("Add", ["v", "v"], ["w"])]
    loop = node("Loop", ["n", "t", "x"], ["y"], body=helper.make_graph(turns, "b", ends, results))
    tensors = [numpy_helper.from_array(np.array(1 << 62), "n"),
               numpy_helper.from_array(np.array(True), "t")]  # fmt: skip
    path = file(tmp_path, [loop], tensors, ("n", 4))
    with pytest.raises(BadInput, match="makes 4,611,686,018,427,387,904 trips"):
        gw.optimize(gw.load(path), "clean{optional=true}")


def test_what_fits_into_no_memory_is_not_run_by_the_source_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by shapes alone: of doublings, and of a size that the file gives."""

    def start(self: OnnxOriginal) -> Run:
        raise AssertionError("it would take all memory")

    monkeypatch.setattr(OnnxOriginal, "start", start)
    doubled = [node("Concat", [f"d{i}"] * 2, [f"d{i + 1}"], f"twice{i}", axis=0) for i in range(40)]
    growing = [node("Identity", ["x"], ["d0"]), *doubled, node("ReduceSum", ["d40"], ["y"])]
    sized = [
        node("ConstantOfShape", ["s"], ["z"], "big"), node("ReduceSum", ["z"], ["r"], keepdims=0),
        node("Add", ["x", "r"], ["y"]),
    ]  # fmt: skip
    for name, nodes in (("twice", growing), ("big", sized)):
        graph = gw.load(file(tmp_path, nodes, [whole("s", 1 << 20, 1 << 20)], ("n", 4)))
        with pytest.raises(BadInput, match=rf"^{name}.*its result.* would take .* GB of memory"):
            gw.optimize(graph, "clean{optional=true}")


def test_sizes_that_a_file_computes_take_no_more_than_there_is(tmp_path: Path) -> None:
    """From a shape, and in a branch: by ONNX Runtime as the source, and as what runs a node."""
    big = node("ConstantOfShape", ["size"], ["z"], "big")
    summed = [node("ReduceSum", ["z"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"])]
    shaped = [
        node("Shape", ["x"], ["s"], end=1), node("Mul", ["s", "many"], ["size"]), big, *summed
    ]  # fmt: skip
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([big], "b", [], [out])
    other = helper.make_graph([node("Neg", ["x"], ["z"])], "c", [], [out])
    branched = [
        node("ReduceMax", ["x"], ["m"], keepdims=0), node("Less", ["m", "far"], ["c"]),
        node("Identity", ["many"], ["size"]),
        node("If", ["c"], ["z"], "choose", then_branch=branch, else_branch=other), *summed,
    ]  # fmt: skip
    tensors = [whole("many", 1 << 36), whole("far", 1 << 30, dtype=np.float32)]
    far = r"big \(ConstantOfShape\): its result would take \d{3}\.\d GB of memory"
    cases = {"ONNX Runtime fails on these inputs": shaped, r"in choose \(If\)": branched}
    for where, nodes in cases.items():
        graph = gw.load(file(tmp_path, nodes, tensors, ("n", 4)))
        with pytest.raises(BadInput, match=f"{where}: {far}"):
            gw.optimize(graph, "clean{optional=true}")


def test_a_graph_that_was_edited_is_held_against_nothing() -> None:
    graph = gw.trace(*net())
    first = gw.optimize(graph, "quantize{bits=4 group=32}")
    assert first.report.truth["by"] == "the module Net"
    assert first.report.truth["error"]["rel_l2"] < 1e-6
    again = gw.optimize(first.graph, "clean{optional=true}")
    assert again.report.truth["by"] == ""
    assert again.report.truth["unheard"] == "the graph was edited after it was read"


def test_the_manifest_and_the_terminal_say_on_what_it_was_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Any = importlib.import_module("graphwright.tools.cli.main").main
    with pytest.raises(SystemExit) as ended:
        main(["run", mlp(tmp_path), "-p", "quantize{bits=8 group=32}", "-o", str(tmp_path / "out")])
    assert ended.value.code == 0
    text = " ".join("".join(capsys.readouterr()).split())
    assert "judged on 2 random inputs: cosine" in text
    runtime = "ONNX Runtime 1."
    assert f"read as {runtime}" in text and "on these samples, an input of 3 x 32: rel. L2" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Judged on 2 random inputs." in page and f"read as {runtime}" in page


def test_calibration_data_is_named_where_a_result_was_judged_on_it(tmp_path: Path) -> None:
    data = tmp_path / "rows.npz"
    np.savez(data, x=RNG.standard_normal((6, 32)).astype(np.float32))
    request = pipeline.Request(
        mlp(tmp_path), gw.Recipe.parse("quantize{bits=8 group=32}"), tmp_path / "out",
        calibration=str(data),
    )  # fmt: skip
    checks = pipeline.run(request, silent).verification
    assert checks.data == f"samples of --calib {data}" and checks.samples == 6
    assert checks.source is not None and checks.source.error is not None


def test_an_output_of_zeros_is_judged_absolutely(tmp_path: Path) -> None:
    zeros = numpy_helper.from_array(np.zeros((32, 12), np.float32), "w")
    model = file(tmp_path, [node("MatMul", ["x", "w"], ["y"], name="zero")], [zeros], ("n", 32))
    recipe = gw.Recipe.parse("quantize{bits=8 group=32}")
    checks = pipeline.run(pipeline.Request(model, recipe, tmp_path / "out"), silent).verification
    assert checks.outputs[0].max_abs is not None and checks.outputs[0].max_abs < 1e-6
