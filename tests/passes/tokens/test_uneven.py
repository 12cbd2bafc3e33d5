"""Texts whose layers differ: windows and turns of two kinds, keys that others made, states.

Gemma 4 and Qwen3.5, whose library is cut by hooks (``by_hooks``), in a prompt and in steps behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.pictures import image_features
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import next_step
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from torch import Tensor

from .by_hooks import Told
from .llava import Batch, Score, close, last_paid, last_will_pay, transformers, with_past
from .reference_scores import paired

IMAGE, WORDS = 96, torch.tensor([[11, 12], [13, 14]])
TEXTS: dict[str, dict[str, Any]] = {
    "gemma4-vl": {
        "sliding_window": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4-e2b-vl": {
        "sliding_window": 8, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "qwen3.5-vl": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}  # fmt: skip
"""The last prompt token sees some of an image through the window; the last layer of the second one
looks at the keys of its layer 1."""


@dataclass
class Models:
    library: Any
    folder: Path
    fx: View

    def graph(self, kind: str) -> View:
        return self.fx if kind == "fx" else translated(self.fx)

    def prompt(self) -> Batch:
        """Padded on the left, an image each."""
        image = [IMAGE] * len(self.fx.source.prompt)
        texts = [[5, 6, *image, 7, 8, 9], [4, *image, 3, 2]]
        ids = torch.tensor([[0] * (11 - len(text)) + text for text in texts])
        generator = torch.Generator().manual_seed(0)
        (height, width) = FAMILIES["gemma4-vl"].sizes["vision_config"]["image_size"]
        pixels = torch.rand(2, 3, height, width, generator=generator)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Models]:
    made: dict[str, Models] = {}

    def model(name: str) -> Models:
        if name not in made:
            made[name] = _saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return model


def _saved(name: str, folder: Path) -> Models:
    sizes = FAMILIES[name].sizes
    text = sizes["text_config"] | TEXTS[name]
    vision = sizes["vision_config"] | {"num_hidden_layers": 1, "depth": 1}
    save(replace(FAMILIES[name], sizes={
        **sizes, "text_config": text, "vision_config": vision}), folder)  # fmt: skip
    kind = getattr(transformers, FAMILIES[name].model)
    library = kind.from_pretrained(folder, attn_implementation="eager").eval()
    return Models(library, folder, load(folder))


def steps(view: View, prompt: Batch, run: Callable[[Batch], Any]) -> Tensor:
    """Logits of the prompt's last position and of each word after it."""
    batch, logits = with_past(view, prompt), []
    for step in range(WORDS.shape[1] + 1):
        outputs = run(batch)
        logits.append(outputs["logits"][:, -1])
        following = next_step(batch, outputs)
        assert following is not None
        batch = following | {"input_ids": WORDS[:, step : step + 1]}
    return torch.stack(logits, 1)


def features(models: Models, batch: Batch) -> Tensor:
    return image_features(models.library, batch["pixel_values"])[0]


def in_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """AIM's features, at the places where the text reads them, and which these are."""
    together, chosen = torch.zeros_like(x), torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, vectors in enumerate(x):
        made, homes = paired(vectors, 4)
        together[row, homes], chosen[row, homes] = made, True
    return together, chosen


@pytest.mark.parametrize(
    ("name", "kind", "recipe", "cuts", "score"),
    [
        ("gemma4-vl", "fx", "pyramid-drop{stages=2}", {1: 3}, last_will_pay),
        ("gemma4-vl", "onnx", "aim{merge=4 prune_from=1 prune_to=2}", {0: 4, 2: 0}, last_paid),
        ("gemma4-e2b-vl", "onnx", "fastv{layer=1 keep=3}", {1: 3}, last_paid),
        ("qwen3.5-vl", "fx", "fastv{layer=2 keep=3}", {2: 3}, last_paid),
    ],
)  # fmt: skip
def test_a_prompt_and_what_follows_is_the_library_s(
    models: Callable[[str], Models], name: str, kind: str, recipe: str,
    cuts: dict[int, int | Tensor], score: Score,
) -> None:  # fmt: skip
    """As one forward over prompt and words with the prompt's choices; in ONNX Runtime too."""
    here = models(name)
    prompt = here.prompt()
    gemma, remade = name.startswith("gemma"), None
    anew = [0] if recipe.startswith("aim") else not recipe.startswith("fastv")
    with torch.no_grad():
        if recipe.startswith("aim"):
            remade, cuts = lambda x: in_pairs(x)[0], cuts | {0: in_pairs(features(here, prompt))[1]}
        told = Told(here.library, prompt, cuts, score, gemma and anew, remade)
        told.logits()
        whole = prompt | {
            "input_ids": torch.cat([prompt["input_ids"], WORDS], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(WORDS)], 1),
        }
        chosen = dict(zip(cuts, told.choices, strict=True))
        again = Told(here.library, whole, chosen, score, gemma and anew, remade)
        expected = again.logits()[:, -WORDS.shape[1] - 1 :]
    graph = here.graph(kind)
    view = gw.optimize(graph, recipe, samples=[with_past(graph, prompt)]).graph
    close(steps(view, prompt, lambda batch: sweep(view, batch)), expected)
    run = gw.compile(view, backend="onnxruntime")
    close(steps(view, prompt, lambda batch: run(**batch)), expected)


def test_keys_that_others_made_are_cut_where_no_cache_holds_them(
    models: Callable[[str], Models]
) -> None:
    here = models("gemma4-e2b-vl")
    prompt = here.prompt()
    view = gw.optimize(load(here.folder, cache=False), "fastv{layer=2 keep=3}").graph
    with torch.no_grad():
        expected = Told(here.library, prompt, {2: 3}).logits()
    close(sweep(view, prompt)["logits"][:, -4:], expected[:, -4:])


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("gemma4-e2b-vl", "fastv{layer=2 keep=3}",
         r"2 .* looks at the keys of block 1, .* before block 1 \(`fastv\{layer=1\}`\) or before"),
        ("gemma4-e2b-vl", "pyramid-drop{stages=3}", "looks at the keys of block 1, .* without a "),
        ("qwen3.5-vl", "fastv{layer=1 keep=3}",
         "block 0 .* no attention .* block 1 has it, and `fastv` is there at layer=2"),
        ("qwen3.5-vl", "pyramid-drop{stages=2}", "block 0 .* `visual-exit` need none"),
        ("qwen3.5-vl", "vtc-cls{keep=3}", "no CLS token to score patches by; `fopru`"),
        ("gemma4-vl", "tome", "the graph does not tell of which"),
    ],
)  # fmt: skip
def test_where_tokens_cannot_leave(
    models: Callable[[str], Models], name: str, recipe: str, message: str
) -> None:
    """Said by a plan already."""
    with pytest.raises(BadInput, match=message):
        gw.plan(models(name).fx, recipe)
