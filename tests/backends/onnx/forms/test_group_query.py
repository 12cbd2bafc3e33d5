"""Attention beside its cache as one node, for a GPU and for onnxruntime-genai: it computes what the
library does.

The CPU provider has these nodes in float16, so that what is written for CUDA runs here.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import graphwright as gw
import onnx_ir
import pytest
import torch
from graphwright.backends.generation import steps
from graphwright.backends.generation.decode import Decoder
from graphwright.backends.onnx.forms.row_places import Places
from graphwright.backends.onnx.lowering import lowered, remarks, translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Refusal
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.verify import difference
from graphwright.ir.structure.cache_slots import ROWS_KEY
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.vocab.targets import CUDA

LAYERS, WORDS = 2, 96
F16 = 5e-3
"""Relative L2 between two runs in float16."""


def folder(path: Path, kind: str = "Llama", **settings: Any) -> Path:
    transformers: Any = importlib.import_module("transformers")
    sizes = {
        "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 48, "head_dim": 16,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    arguments = {k: v for k, v in {**sizes, **settings}.items() if v is not None}
    config = getattr(transformers, f"{kind}Config")(**arguments)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def nodes(view: OnnxView, op: str = "GroupQueryAttention") -> list[onnx_ir.Node]:
    return [node for node in view.model.graph if node.op_type == op]


def attrs(node: onnx_ir.Node) -> dict[str, Any]:
    return {name: attr.value for name, attr in node.attributes.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    view = gw.load(llama, dtype=torch.float16)
    return gw.export(view, tmp_path_factory.mktemp("out") / "f16", target="cuda")


@functools.cache
def library(path: Path) -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def calls(path: Path, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The library's logits on a prompt and on a step after it."""
    with torch.no_grad():
        first = library(path)(ids, attention_mask=mask)
        grown = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], 1)
        places = (grown.cumsum(1) - 1)[:, -1:]
        step = library(path)(
            ids[:, :1], attention_mask=grown, past_key_values=first.past_key_values,
            position_ids=places,
        )  # fmt: skip
    return [first.logits, step.logits]


def ours(path: Path, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    run = gw.compile(path)
    first = run(input_ids=ids, attention_mask=mask)
    past = {n.replace("present", "past_key_values"): t for n, t in first.items() if n != "logits"}
    grown = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], 1)
    step = run(input_ids=ids[:, :1], attention_mask=grown, **past)
    return [first["logits"], step["logits"]]


def same(path: Path, out: Path, mask: torch.Tensor, bound: float = F16) -> None:
    """The artifact gives what the library does, where there is text."""
    ids = torch.randint(1, WORDS, mask.shape, generator=torch.Generator().manual_seed(3))
    real = [mask.bool(), torch.ones(len(mask), 1, dtype=torch.bool)]
    pairs = zip(calls(path, ids, mask), ours(out, ids, mask), strict=True)
    for (expected, actual), held in zip(pairs, real, strict=True):
        assert difference(expected[held], actual[held]).rel_l2 <= bound


def test_it_is_made_of_the_targets_nodes(artifact: Path) -> None:
    view = OnnxView(onnx_ir.load(artifact / "model.onnx"))
    attentions = nodes(view)
    assert len(attentions) == LAYERS
    for node in attentions:
        assert attrs(node) == {
            "num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "softcap": 0.0,
            "local_window_size": -1, "do_rotary": 1, "rotary_interleaved": 0,
        }  # fmt: skip
        assert node.inputs[1] is node.inputs[2] is None  # queries, keys and values in one
        assert [str(d) for d in node.inputs[7].shape] == ["64", "8"]
    assert len(nodes(view, "SkipSimplifiedLayerNormalization")) == 2 * LAYERS
    assert len(nodes(view, "MatMul")) == 5 * LAYERS + 1
    kinds = {node.op_type for node in view.model.graph}
    assert not kinds & {"Softmax", "Concat", "Cos", "Transpose", "Where"}
    assert {value.dtype for value in view.model.graph.outputs} == {onnx_ir.DataType.FLOAT16}


@pytest.mark.parametrize("mask", [torch.ones(2, 7, dtype=torch.int64),
                                  torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])])  # fmt: skip
def test_it_computes_what_the_library_does(llama: Path, artifact: Path, mask: torch.Tensor) -> None:
    same(llama, artifact, mask)


def test_padding_before_a_text_is_refused(artifact: Path) -> None:
    run = gw.compile(artifact)
    with pytest.raises(BadInput, match=r"padding comes before a text.*--target cpu"):
        run(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[0, 1, 1]]))


def test_prompts_of_several_lengths_are_written_as_each_alone(artifact: Path) -> None:
    prompts = [[5, 17, 3, 80], [44], [9, 9, 31]]
    run = gw.compile(artifact)

    def written(texts: list[list[int]]) -> list[tuple[int | None, ...]]:
        return list(zip(*Decoder(run).decode(texts, max_new_tokens=6), strict=True))

    assert written(prompts) == [row for prompt in prompts for row in written([prompt])]


def test_genai_is_told_to_share_the_cache(artifact: Path) -> None:
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["search"] == {"max_length": 64, "past_present_share_buffer": True}
    assert config["model"]["decoder"]["session_options"] == {"provider_options": [{"cuda": {}}]}


def test_it_is_read_back(llama: Path, artifact: Path) -> None:
    view = gw.load(artifact)
    canonicalize(view)
    structure = recognize(view)
    assert len(structure.attentions) == len(structure.blocks) == LAYERS
    inputs = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6).long()}
    logits = gw.compile(view, backend="eager")(**inputs)["logits"]
    expected = library(llama)(**inputs).logits
    assert difference(expected, logits).rel_l2 <= F16


PLAIN = {"num_key_value_heads": None, "head_dim": None}
KINDS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "normed": ("Qwen3", {}, {"do_rotary": 1}),
    "capped, in a window": ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 20.0},
                            {"softcap": 20.0, "local_window_size": 5, "do_rotary": 1}),
    "turned in part": ("Phi", {"hidden_size": 128, "head_dim": None}, {"do_rotary": 1}),
    "learned positions": ("GPT2", {"n_positions": 64, **PLAIN}, {"do_rotary": 0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_attention(kind: str, tmp_path: Path) -> None:
    family, settings, expected = KINDS[kind]
    source = folder(tmp_path / "source", family, **settings, num_hidden_layers=1)
    out = gw.export(gw.load(source, dtype=torch.float16), tmp_path / "out", target="cuda")
    attentions = nodes(OnnxView(onnx_ir.load(out / "model.onnx")))
    assert len(attentions) == 1 and expected.items() <= attrs(attentions[0]).items()
    config = json.loads((out / "genai_config.json").read_text())
    # What is turned outside, or counted, goes by the length of the cache.
    assert config["search"]["past_present_share_buffer"] == bool(expected["do_rotary"])
    same(source, out, torch.ones(2, 9, dtype=torch.int64))


def test_float32_keeps_the_general_form_and_says_so(llama: Path) -> None:
    view = lowered(gw.load(llama), CUDA)
    assert not nodes(view) and ROWS_KEY not in view.metadata()
    (remark,) = remarks(view)
    assert remark.startswith("2 of 2 attentions keep their general form, not GroupQueryAttention: ")
    assert "takes float16 and bfloat16 there: choose one by --dtype" in remark


def test_a_cpu_writes_into_the_cache_where_it_lies(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target ``genai``, float32: the words that the form without the node writes, which the library
    does too, in buffers that grow on the way and in rows of several lengths."""
    monkeypatch.setattr(steps, "ROOM", 4)
    view = gw.load(llama)
    outs = {name: gw.export(view, tmp_path / name, target=name) for name in ("genai", "cpu")}
    assert len(nodes(OnnxView(onnx_ir.load(outs["genai"] / "model.onnx")))) == LAYERS
    same(llama, outs["genai"], torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]), 1e-5)
    prompts = [[5, 17, 3, 80], [44], [9, 9, 31]]
    texts = {
        name: [*Decoder(gw.compile(out)).decode(prompts, max_new_tokens=11)]
        for name, out in outs.items()
    }
    assert texts["genai"] == texts["cpu"]
    config = json.loads((outs["genai"] / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"]
    assert "session_options" not in config["model"]["decoder"]


class Masked(torch.nn.Module):
    """What a decoder may compute of its tokens' places, and of more."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        keys = torch.arange(attention_mask.shape[1])
        own = torch.arange(input_ids.shape[1]) + keys.shape[0] - input_ids.shape[1]
        before = keys[None] <= own[:, None]
        held = (attention_mask > 0)[:, None, None]
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        angles = places[..., None] * torch.tensor([0.5, 0.25, 0.5, 0.25])
        return {
            "plain": before & held,
            "window": before & held & (keys[None] > own[:, None] - 6),
            "added": torch.where(before & held, 0.0, torch.finfo(torch.float32).min),
            "prefix": (before | (keys < 2)[None]) & held,
            "sloped": torch.where(before & held, -(own[:, None] - keys[None]) / 8.0, -torch.inf),
            "of ids": (before | (input_ids == 7)[:, None, :1, None]) & held,
            "angles": angles.cos()[:, None],
            "columns": (own[:, None] * 0.5).cos().expand(1, 1, -1, 2),
            "halves": (angles * torch.arange(1, 5)).cos()[:, None],
        }


@pytest.fixture(scope="module")
def masked() -> tuple[Places, dict[str, Any]]:
    dims = [torch.export.Dim.AUTO] * 2
    args = (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64))
    view = translated(trace(Masked(), args, dynamic_shapes=(dict(enumerate(dims)),) * 2))
    return Places(view, 64), dict(zip(view.output_names(), view.outputs(), strict=True))


@pytest.mark.parametrize(("name", "window"), [("plain", -1), ("window", 6), ("added", -1)])
def test_masks_of_rows(name: str, window: int, masked: tuple[Places, dict[str, Any]]) -> None:
    places, values = masked
    assert places.window(values[name]) == window


def test_angles_of_places(masked: tuple[Places, dict[str, Any]]) -> None:
    places, values = masked
    angles = places.angles(values["angles"])
    assert torch.equal(angles, (torch.arange(64)[:, None] * torch.tensor([0.5, 0.25])).cos())
    unknown = Places(places.view, None)
    with pytest.raises(Refusal, match="how long a text may be is not known"):
        unknown.angles(values["angles"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prefix", "hides other keys than padding"), ("sloped", "adds numbers to the logits"),
        ("of ids", "depends on input_ids"), ("columns", "do not follow from the place"),
        ("halves", "not turned by the same angles"),
    ],
)  # fmt: skip
def test_what_is_computed_otherwise(
    name: str, reason: str, masked: tuple[Places, dict[str, Any]]
) -> None:
    places, values = masked
    ask: Callable[[Any], Any] = places.angles if name in ("columns", "halves") else places.window
    for _ in range(2):
        with pytest.raises(Refusal, match=reason):
            ask(values[name])
