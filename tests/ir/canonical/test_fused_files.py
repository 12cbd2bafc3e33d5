"""Whole files of fused ops: what ONNX Runtime's optimizer makes of BERT, and a decoder as
onnxruntime-genai's builder writes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphwright.backends.runtimes.original import load
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.moves import Path as BlockPath
from graphwright.ir.moves import follow
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.truth import ask, hold
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import recognize
from onnx import helper

from .written import in_runtime, rand, read, tensors, written

LAYERS, HEADS, WIDTH, VOCAB = 3, 4, 64, 99


class Bert(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=96,
            num_attention_heads=HEADS, max_position_embeddings=32, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
        return out.last_hidden_state  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """BERT as torch exports it and ``onnxruntime.transformers.optimizer`` fuses it."""
    from onnxruntime.transformers import optimizer

    file: Path = tmp_path_factory.mktemp("bert") / "model.onnx"
    ids = torch.arange(10).reshape(2, 5)
    names = ["ids", "mask", "kinds"]
    torch.onnx.export(
        Bert().eval(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(file),
        input_names=names, output_names=["y"], opset_version=18, dynamo=False,
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*names, "y"]},
    )  # fmt: skip
    model = optimizer.optimize_model(str(file), "bert", HEADS, WIDTH, opt_level=0).model
    ops = {node.op_type for node in model.graph.node}
    assert {"Attention", "EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"} <= ops
    return model


def test_an_optimized_bert_is_read_whole(bert: onnx.ModelProto) -> None:
    view = read(bert)
    canonicalize(view)
    check_structure(view)
    structure = recognize(view)
    assert [len(block.linears) for block in structure.blocks] == [4] * LAYERS
    assert [site.role for site in structure.linears] == ["qkv", "o", "fc1", "fc2"] * LAYERS
    assert [site.heads for site in structure.attentions] == [HEADS] * LAYERS
    ids = np.arange(14).reshape(2, 7)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    feeds = {"ids": ids, "mask": mask, "kinds": ids % 2}
    (expected,) = in_runtime(bert, feeds)
    torch.testing.assert_close(sweep(view, tensors(feeds))["y"], expected, rtol=1e-4, atol=1e-5)
    view.canonical = None
    assert canonicalize(view).total == 0


# --- GPT-2 ----------------------------------------------------------------------------------------


class Gpt2(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32,
            attn_implementation="eager", use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = GPT2Model(config)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gpt2, Path]:
    """GPT-2, and the file that torch exports of it below opset 18, without shapes inside."""
    file: Path = tmp_path_factory.mktemp("gpt2") / "model.onnx"
    module, ids = Gpt2().eval(), torch.arange(10).reshape(2, 5)
    torch.onnx.export(
        module, (ids, torch.ones_like(ids)), str(file), input_names=["ids", "mask"],
        output_names=["y"], opset_version=17, dynamo=False,
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in ("ids", "mask", "y")},
    )  # fmt: skip
    return module, file


def optimized_gpt2(file: Path) -> onnx.ModelProto:
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(file), "gpt2", HEADS, WIDTH, opt_level=0).model
    ops = {node.op_type for node in model.graph.node}
    assert {"SkipLayerNormalization", "FastGelu"} <= ops
    return model


@pytest.mark.parametrize("written_by", ["torch", "onnxruntime", "onnx"])
def test_a_gpt2_loses_a_block_whoever_named_its_sizes(
    written_by: str, gpt2: tuple[Gpt2, Path], tmp_path: Path
) -> None:
    module, file = gpt2
    model = onnx.load(file)
    if written_by == "onnxruntime":
        model = optimized_gpt2(file)
    if written_by == "onnx":
        model = onnx.shape_inference.infer_shapes(model)
        names = {d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim}
        assert any(name.startswith("unk__") for name in names)
    onnx.save(model, tmp_path / "model.onnx")
    view = load_onnx(tmp_path / "model.onnx")
    canonicalize(view)
    structure = recognize(view)
    assert [site.heads for site in structure.attentions] == [HEADS] * LAYERS
    ends = [view.type(block.exit).shape for block in structure.blocks]
    assert ends == [("batch", "tokens", WIDTH)] * LAYERS
    follow(view, structure.blocks, BlockPath.parse("0,2"), rule="test")
    check_structure(view)
    ids = torch.arange(14).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    short = copy.deepcopy(module)
    del short.model.h[1]
    with torch.no_grad():
        expected = short(ids, mask)
    actual = sweep(view, {"ids": ids, "mask": mask})["y"]
    torch.testing.assert_close(actual[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)


# --- a decoder ------------------------------------------------------------------------------------

KV_HEADS, HEAD = 2, 16


def decoder() -> onnx.ModelProto:
    """Llama's layers in the nodes, inputs and outputs of onnxruntime-genai's builder."""
    nodes: list[Any] = []
    constants: dict[str, Any] = {
        "embed": rand(VOCAB, WIDTH), "one": np.array([1]), "axis": np.array(1),
        "cos": np.cos(rand(32, HEAD // 2)), "sin": np.sin(rand(32, HEAD // 2)),
    }  # fmt: skip

    def add(op: str, inputs: str, outputs: str, microsoft: bool = False, **attrs: Any) -> None:
        parts = [[("" if n == "-" else n) for n in text.split()] for text in (inputs, outputs)]
        domain = "com.microsoft" if microsoft else ""
        nodes.append(helper.make_node(op, *parts, name=parts[1][0], domain=domain, **attrs))

    def linear(x: str, name: str, width: int, to: int) -> str:
        constants[f"{name}.weight"] = rand(width, to) / 8
        add("MatMul", f"{x} {name}.weight", name)
        return name

    def norm(name: str) -> str:
        constants[name] = 1 + rand(WIDTH) / 8
        return name

    add("Gather", "embed input_ids", "x")
    add("Cast", "attention_mask", "mask", to=6)
    add("ReduceSum", "mask one", "rows", keepdims=0)
    add("Sub", "rows one32", "lengths")
    constants["one32"] = np.array([1], np.int32)
    add("Shape", "attention_mask", "shape")
    add("Gather", "shape axis", "total64", axis=0)
    add("Cast", "total64", "total", to=6)
    add("SimplifiedLayerNormalization", f"x {norm('n0')}", "h", epsilon=1e-6, axis=-1)
    stream, past, present = "x", [], []
    for i in range(LAYERS):
        old = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        new = [f"present.{i}.{part}" for part in ("key", "value")]
        past, present = past + old, present + new
        qkv = linear("h" if i == 0 else f"h{i}", f"l{i}.qkv", WIDTH, WIDTH + 2 * KV_HEADS * HEAD)
        add(
            "GroupQueryAttention", f"{qkv} - - {' '.join(old)} lengths total cos sin",
            f"a{i} {' '.join(new)}", True, num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )  # fmt: skip
        out = linear(f"a{i}", f"l{i}.o", WIDTH, WIDTH)
        skip = "SkipSimplifiedLayerNormalization"
        add(skip, f"{stream} {out} {norm(f'm{i}')}", f"g{i} - - s{i}", True, epsilon=1e-6)
        gate, up = (linear(f"g{i}", f"l{i}.{n}", WIDTH, 96) for n in ("gate", "up"))
        add("QuickGelu", gate, f"act{i}", True, alpha=1.0)
        add("Mul", f"act{i} {up}", f"both{i}")
        down = linear(f"both{i}", f"l{i}.down", 96, WIDTH)
        outs = f"h{i + 1} - - t{i}" if i < LAYERS - 1 else f"h{i + 1}"
        add(skip, f"s{i} {down} {norm(f'e{i}')}", outs, True, epsilon=1e-6)
        stream = f"t{i}"
    linear(f"h{LAYERS}", "head", WIDTH, VOCAB)
    add("Identity", "head", "logits")
    text = np.zeros((1, 1), np.int64)
    cache = np.zeros((1, KV_HEADS, 0, HEAD), np.float32)
    feeds = {"input_ids": text, "attention_mask": text, **dict.fromkeys(past, cache)}
    shapes = {
        "input_ids": ("batch", "tokens"), "attention_mask": ("batch", "total"),
        **dict.fromkeys(past, ("batch", KV_HEADS, "past", HEAD)),
    }  # fmt: skip
    return written(nodes, feeds, constants, ["logits", *present], shapes)


def step(model: onnx.ModelProto, ids: Any, past: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Inputs of one call, and what ONNX Runtime makes of them."""
    names = [value.name for value in model.graph.input][2:]
    kept = past[0].shape[2] if past else 0
    empty = np.zeros((len(ids), KV_HEADS, 0, HEAD), np.float32)
    mask = np.ones((len(ids), kept + ids.shape[1]), np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask}
    feeds |= dict(zip(names, past or [empty] * len(names), strict=True))
    return feeds, in_runtime(model, feeds)


def agrees(view: View, feeds: dict[str, Any], expected: list[torch.Tensor]) -> None:
    actual = sweep(view, tensors(feeds))
    for name, value in zip(view.output_names(), expected, strict=True):
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


def test_a_decoder_with_a_cache_is_read_whole_and_loses_a_block() -> None:
    model = decoder()
    view = read(model)
    canonicalize(view)
    check_structure(view)
    structure = recognize(view)
    roles = ["qkv", "o", "gate", "up", "down"]
    assert [site.role for site in structure.linears] == [*roles * LAYERS, "head"]
    assert [len(block.linears) for block in structure.blocks] == [5] * LAYERS
    sites = structure.attentions
    assert [(s.heads, s.kv_heads, s.head_dim) for s in sites] == [(HEADS, KV_HEADS, HEAD)] * LAYERS
    slots = [site.cache for site in sites]
    assert [view.name(slot.past[1]) for slot in slots if slot] == [
        f"past_key_values.{i}.value" for i in range(LAYERS)
    ]
    inputs = sample_inputs(view, sizes={"past": 3})
    assert inputs["attention_mask"].shape[1] == 3 + inputs["input_ids"].shape[1]
    prompt = np.arange(10).reshape(2, 5)
    feeds, expected = step(model, prompt, None)
    agrees(view, feeds, expected)
    feeds, expected = step(model, prompt[:, :1], [t.numpy() for t in expected[1:]])
    agrees(view, feeds, expected)
    follow(view, structure.blocks, BlockPath.parse("0,2"), rule="test")
    check_structure(view)
    assert len(view.input_names()) == 2 + 2 * (LAYERS - 1)
    assert len(recognize(view).blocks) == LAYERS - 1


def test_a_decoder_that_takes_no_chunk_of_several_rows_is_asked_for_a_step(tmp_path: Path) -> None:
    """GroupQueryAttention takes several tokens behind a cache of one row alone."""
    onnx.save(decoder(), tmp_path / "model.onnx")
    view = load(tmp_path / "model.onnx")
    assert view.source.original is not None
    truth = ask(view, view.source.original, [sample_inputs(view)])
    asked = ["an input of 3 x 5, padded on the left", "a step after that"]
    assert [run.what for run in truth.probes] == asked
    assert truth.unheard.startswith("not on a chunk after it: ")
    assert truth.probes[-1].inputs["past_key_values.0.key"].shape == (3, KV_HEADS, 5, HEAD)
    graph = view.copy()
    canonicalize(graph)
    hold(view, graph, truth, [sweep(graph, run.inputs) for run in truth.samples])
