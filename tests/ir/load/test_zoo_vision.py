"""The shipped vision models: they trace, run elsewhere with the same numbers, and have learned."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.zoo import scenes
from graphwright.ir.load.zoo.text import read_tokenizer
from graphwright.ir.load.zoo.tiny_vision import (
    LLAVA,
    LLAVA_DETAILS,
    LLAVA_NEXT,
    VIDEO,
    VIT,
)
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.pictured import read_prompt
from graphwright.ir.structure.recognize import recognize

FOLDERS = {"tiny-vit": VIT, "tiny-llava": LLAVA}
"""``tiny-llava-next`` is in ``tests/tools/zoo/test_llava_next.py``."""
CLASSES = {
    "tiny-vit": "ViTForImageClassification", "tiny-llava": "LlavaForConditionalGeneration",
}  # fmt: skip


@pytest.fixture(scope="module")
def graphs() -> dict[str, FxView]:
    return {name: gw.load(f"zoo:{name}", cache=False) for name in FOLDERS}


def two(view: FxView) -> dict[str, torch.Tensor]:
    return {name: value[:2] for name, value in view.source.samples[0].items()}


def real(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Without the positions of padding, where nothing is promised."""
    return logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits


def test_images_and_rows_that_do_not_fit_each_other(graphs: dict[str, FxView]) -> None:
    """Without a cache a row has one image; a prompt without its image is none."""
    view = graphs["tiny-llava"]
    assert read_prompt(view.metadata()) == view.source.prompt == (3,) * 144
    one = {name: value[:1] for name, value in view.source.samples[0].items()}
    twice = {name: torch.cat([value, value], 1) for name, value in one.items()}
    pair = twice | {"pixel_values": one["pixel_values"].expand(2, -1, -1, -1)}
    with pytest.raises(BadInput, match="batch is 1 in input input_ids and 2 in input pixel_values"):
        sweep(view, pair)
    with pytest.raises(BadInput, match=r"288 times the token 3.* the 1 images of pixel_values"):
        sweep(view, twice | {"pixel_values": one["pixel_values"]})


@pytest.mark.parametrize(
    ("name", "task", "inputs", "output"),
    [
        ("tiny-vit", "image-classification", ("f32[batch, 3, 48, 48]",), "f32[batch, 10]"),
        (
            "tiny-llava",
            "image-text-to-text",
            ("i64[batch, seq]", "i64[batch, seq]", "f32[batch, 3, 96, 96]"),
            "f32[batch, seq, 36]",
        ),
    ],
)
def test_signatures(
    graphs: dict[str, FxView], name: str, task: str, inputs: tuple[str, ...], output: str
) -> None:
    view = graphs[name]
    assert tuple(str(view.type(v)) for v in view.inputs()) == inputs
    assert [str(view.type(v)) for v in view.outputs()] == [output]
    source = view.source
    assert (source.kind, source.name, source.task) == ("zoo", f"zoo:{name}", task)
    assert source.folder == str(FOLDERS[name])
    assert sum(len(next(iter(batch.values()))) for batch in source.samples) == 32
    stored = {w.dtype for w in view.weights().values() if w.dtype.is_floating_point}
    assert stored == {torch.float32}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_graph_is_the_library_s_model(graphs: dict[str, FxView], name: str) -> None:
    transformers: Any = importlib.import_module("transformers")
    cls = getattr(transformers, CLASSES[name])
    feeds = two(graphs[name])
    eager = cls.from_pretrained(FOLDERS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = eager(**feeds).logits
    got = sweep(graphs[name], feeds)["logits"]
    torch.testing.assert_close(real(feeds, got), real(feeds, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_artifact_runs_in_onnx_runtime(
    graphs: dict[str, FxView], name: str, tmp_path: Path
) -> None:
    import onnxruntime

    feeds = two(graphs[name])
    gw.export(graphs[name], tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (got,) = session.run(["logits"], {k: v.numpy() for k, v in feeds.items()})
    expected = sweep(graphs[name], feeds)["logits"]
    logits = torch.from_numpy(got)
    torch.testing.assert_close(real(feeds, logits), real(feeds, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "blocks"), [("tiny-vit", 6), ("tiny-llava", 11)])
def test_attention_is_recognised(graphs: dict[str, FxView], name: str, blocks: int) -> None:
    view = graphs[name].copy()
    canonicalize(view)
    assert len(recognize(view).attentions) == blocks, "the tower's last layer is not used"


def test_the_vit_has_learned(graphs: dict[str, FxView]) -> None:
    count = right = 0
    for pixels, labels in scenes.classified("test", 351):
        logits = sweep(graphs["tiny-vit"], {"pixel_values": pixels})["logits"]
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    assert right / count >= 0.97


def answers(view: FxView, asked: list[scenes.Question]) -> list[str]:
    tokenizer = read_tokenizer(LLAVA)
    words = []
    for batch in scenes.prompt_batches(asked, tokenizer, batch=40):
        last = sweep(view, batch)["logits"][:, -1].argmax(-1)
        words += [tokenizer.id_to_token(int(word)) for word in last]
    return words


@pytest.mark.slow
def test_the_llava_has_learned(graphs: dict[str, FxView]) -> None:
    asked = scenes.questions("test", 80)
    words = answers(graphs["tiny-llava"], asked)
    right = Counter(q.type for q, word in zip(asked, words, strict=True) if q.answer == word)
    assert sum(right.values()) / len(asked) >= 0.93, right
    assert all(right[kind] >= 17 for kind in scenes.TYPES), right


@pytest.mark.parametrize(
    "folder", [VIT, LLAVA, LLAVA_NEXT, LLAVA_DETAILS, VIDEO], ids=lambda folder: folder.name
)
def test_cards_tell_the_recorded_figures(folder: Path) -> None:
    figures = json.loads((folder / "training.json").read_text())["figures"]
    card = (folder / "card.md").read_text()
    for figure, value in figures.items():
        if isinstance(value, float):
            assert f"{100 * value:.1f} %" in card, f"{figure} {value}"
    assert "CC BY 4.0" in card
