"""Manifests as the tools get them: MiniLM's true shapes, made-up but plausible errors and times."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import jsonschema
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.tools.cli.main import main
from graphwright.tools.report import schema
from graphwright.tools.report.manifest import Manifest, parse

HIDDEN, INTERMEDIATE, VOCAB, POSITIONS = 384, 1536, 30522, 512
LINEARS = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (INTERMEDIATE, HIDDEN),
    "output.dense": (HIDDEN, INTERMEDIATE),
}
STEPS = {
    "clean": {"name": "clean", "options": {}, "exact": True},
    "quantize": {
        "name": "quantize",
        "options": {"bits": 4, "group": 32, "symmetric": True, "include": "*", "exclude": ""},
        "exact": False,
        "text": "quantize{bits=4 group=32}",
    },
    "eora": {"name": "eora", "options": {"rank": 32}, "exact": False, "text": "eora{rank=32}"},
}


def site(name: str, shape: tuple[int, int], step: str, index: int) -> dict[str, Any]:
    weights = math.prod(shape)
    codes = weights // 2 + weights // 32 * 2
    side = 2 * 32 * sum(shape)
    error = (0.06 + 0.05 * math.sin(1.7 * index) ** 2) * (0.62 if step == "eora" else 1.0)
    before, after = (4 * weights, codes) if step == "quantize" else (codes, codes + side)
    return {
        "name": name,
        "kind": "linear",
        "shape": list(shape),
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": 8 * after / weights,
        "rel_l2": error,
    }


def tree(layers: int, linear: str, adds: int) -> dict[str, Any]:
    """BERT's modules with ``linear`` as the op of its linears and ``adds`` side paths in each."""

    def leaf(name: str, ops: dict[str, int], size: int) -> dict[str, Any]:
        return {"name": name, "ops": ops, "params_bytes": size, "children": []}

    def node(name: str, *children: dict[str, Any], ops: dict[str, int] | None = None) -> Any:
        return {"name": name, "ops": ops or {}, "params_bytes": 0, "children": list(children)}

    def dense(name: str, shape: tuple[int, int]) -> dict[str, Any]:
        extra = {"linear": 2 * adds, "add": adds} if adds else {}
        size = math.prod(shape) * 4 if linear == "linear" else math.prod(shape) * 9 // 16
        return leaf(name, {linear: 1, **extra}, size)

    square, norm = (HIDDEN, HIDDEN), leaf("LayerNorm", {"layer_norm": 1}, 8 * HIDDEN)
    attention = node(
        "attention",
        node("self", *(dense(n, square) for n in ("query", "key", "value")), ops={"sdpa": 1}),
        node("output", dense("dense", square), norm, ops={"add": 1}),
    )
    wide = node("intermediate", dense("dense", (INTERMEDIATE, HIDDEN)), ops={"gelu": 1})
    narrow = node("output", dense("dense", (HIDDEN, INTERMEDIATE)), norm, ops={"add": 1})
    blocks = [node(str(i), *copy.deepcopy([attention, wide, narrow])) for i in range(layers)]
    embeddings = leaf("embeddings", {"embedding": 3, "add": 2}, 4 * HIDDEN * (VOCAB + POSITIONS))
    pooler = node("pooler", dense("dense", square), ops={"tanh": 1})
    encoder = node("encoder", node("layer", *blocks))
    return node("", embeddings, encoder, pooler, ops={"mean": 1, "div": 2})


def minilm(*steps: str, layers: int = 6) -> dict[str, Any]:
    names = [(f"encoder.layer.{i}.{n}", s) for i in range(layers) for n, s in LINEARS.items()]
    names.append(("pooler.dense", (HIDDEN, HIDDEN)))
    embeddings = 4 * HIDDEN * (VOCAB + POSITIONS + 2)
    weights = embeddings + sum(4 * math.prod(shape) for _, shape in names)
    source, passes = weights, []
    for order, step in enumerate(steps, 1):
        sites = [] if step == "clean" else [site(n, s, step, i) for i, (n, s) in enumerate(names)]
        before = weights
        weights += sum(s["bytes_after"] - s["bytes_before"] for s in sites)
        error = {"rel_l2": 0.0321 / order, "cosine": 1 - 0.0005 / order, "max_abs": 0.0121}
        exact = {"rel_l2": 0.0, "cosine": 1.0, "max_abs": 0.0}
        passes.append(
            {
                **copy.deepcopy(STEPS[step]),
                "order": order,
                "sites": sites,
                "refused": []
                if step == "clean"
                else [{"site": "embeddings.word_embeddings", "reason": "not a linear: embedding"}],
                "edits": 3 if step == "clean" else 0,
                "notes": [],
                "bytes_before": before,
                "bytes_after": weights,
                "macs_before": 1_360_000_000,
                "macs_after": 1_360_000_000 if step != "eora" else 1_520_000_000,
                "error": exact if step == "clean" else error,
                "seconds": 1.25 * order,
                "peak_rss_bytes": 612_000_000,
            }
        )
    final = {"rel_l2": 0.0298, "cosine": 0.999561, "max_abs": 0.0119}
    quantized = "linear_nbit" if "quantize" in steps else "linear"
    return {
        "schema": 1,
        "created": "2026-10-11T09:30:00Z",
        "source": {
            "kind": "zoo",
            "name": "zoo:minilm",
            "sha256": "8c" * 32,
            "task": "text-embedding",
        },
        "recipe": ",".join(STEPS[s].get("text", s) for s in steps),
        "versions": {"graphwright": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        "machine": {"platform": "Linux x86_64", "cpu": "Some CPU", "cores": 2, "device": "cpu"},
        "structure": {"blocks": layers, "linears": len(names), "attention_sites": layers},
        "passes": passes,
        "verification": {
            "samples": 256,
            "data": "sentences of the model's own",
            "max_error": None,
            "outputs": [{"name": "embeddings", **final}],
            "runtime": {
                "optimized": {"rel_l2": 3.1e-7, "cosine": 1.0, "max_abs": 2.4e-7},
                "unoptimized": {"rel_l2": 2.8e-7, "cosine": 1.0, "max_abs": 1.9e-7},
            },
        },
        "sizes": {"source_bytes": source, "artifact_bytes": weights + 41_000},
        "graph_before": tree(layers, "linear", 0),
        "graph_after": tree(layers, quantized, int("eora" in steps)),
    }


@pytest.fixture
def make_json() -> Callable[..., dict[str, Any]]:
    """``make_json("quantize", layers=6)``: a manifest's JSON, of MiniLM after the named passes."""
    return minilm


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    """``make_json`` as the typed model."""
    return lambda *steps, **options: parse(minilm(*steps, **options))


@pytest.fixture(scope="session")
def keeps_schema() -> Callable[[Any], None]:
    """Raises where decoded JSON breaks the schema that is shipped, by another library's reading."""
    known = json.loads(schema.SCHEMA_FILE.read_text(encoding="utf-8"))
    validate: Callable[[Any], None] = jsonschema.Draft202012Validator(known).validate
    return validate


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Llama of two layers, and a byte-level BPE made on English."""
    from graphwright.ir.load.zoo.text import english_sentences

    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("tokenizers")
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        english_sentences(400), vocab_size=700, min_frequency=2, show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=700, max_position_embeddings=96,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_graph(language_model: Path) -> View:
    """The language model's graph, without a cache. Not to be changed."""
    return gw.load(language_model, cache=False)


@pytest.fixture(scope="session")
def plain_artifact(language_graph: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model as it is and without a cache, exported."""
    return gw.export(language_graph, tmp_path_factory.mktemp("made") / "plain")


@pytest.fixture(scope="session")
def llava() -> View:
    """The zoo's model of images and text, without a cache. Not to be changed."""
    return gw.load("zoo:tiny-llava", cache=False)


@pytest.fixture(scope="session")
def vit() -> View:
    """The zoo's model of images. Not to be changed."""
    return gw.load("zoo:tiny-vit")


@pytest.fixture(scope="session")
def publish(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``publish(model, passes, *options)``: the artifact that the command makes."""

    def run(model: Path | str, passes: str, *options: str) -> Path:
        out = tmp_path_factory.mktemp("made") / "out"
        with pytest.raises(SystemExit) as leave:
            main([str(model), "-p", passes, "-o", str(out), "--json", *options])
        assert leave.value.code == 0
        return out

    return run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; (exit code, stdout, stderr on one line)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leave:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(leave.value.code or 0), out, " ".join(err.split())

    return run
