"""Token passes where an image enters the text as one raster with newlines, as in LLaVA-NeXT.

What they give is held against the library's own model, which is told the tokens that stay.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import RELEVANCE
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from graphwright.passes.tokens import globalcom2
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.data.images import Preprocessing
from graphwright.tools.report.token_picture import kept_entry
from graphwright.tools.run import comparing_tokens
from PIL import Image
from torch import Tensor

from .llava import IMAGE as PLACEHOLDER
from .llava import projected, spoken
from .reference_scores import (
    KEPT,
    cls_logits,
    dealt,
    looked_at,
    merged,
    paired,
    shared_out,
    unlike,
    with_keep,
)
from .test_tome import merged as merged_in_tower

transformers: Any = importlib.import_module("transformers")
SIDE, PATCHES = 4, 16
"""Patches along a picture's edge, and all of them."""
IMAGE, NEWLINE = 96, -1
GRIDS = {"square": (2, 2), "wide": (1, 2)}
METHODS = {"fastervlm": looked_at, **KEPT}


@dataclass
class Raster:
    """The library's model and a graph for images of one shape, which come as a ``grid`` of crops:
    the square ones' is of ONNX, the wide ones' of FX."""

    eager: Any
    grid: tuple[int, int]
    traced: View
    graph: View

    @property
    def pictures(self) -> int:
        return 1 + self.grid[0] * self.grid[1]

    @property
    def newlines(self) -> int:
        return self.grid[0] * SIDE

    def order(self) -> list[int]:
        """The patches of an image in the library's order: the thumbnail's, then row by row over all
        crops, each row with a newline."""
        rows, columns = self.grid
        order = list(range(PATCHES))
        for row in range(rows * SIDE):
            for column in range(columns * SIDE):
                crop = 1 + row // SIDE * columns + column // SIDE
                order.append(crop * PATCHES + row % SIDE * SIDE + column % SIDE)
            order.append(NEWLINE)
        return order

    def prompt(self) -> dict[str, Tensor]:
        tokens = len(self.order())
        ids = torch.tensor([[5, *[IMAGE] * tokens, 7, 8], [11, *[IMAGE] * tokens, 12, 13]])
        pixels = torch.randn(2, self.pictures, 3, 16, 16,
                             generator=torch.Generator().manual_seed(0))  # fmt: skip
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def text(self) -> dict[str, Tensor]:
        """The prompt as the other tests' references read it."""
        prompt = self.prompt()
        prompt["input_ids"][prompt["input_ids"] == IMAGE] = PLACEHOLDER
        return prompt

    def pixels(self) -> Tensor:
        """Picture by picture."""
        return self.prompt()["pixel_values"].flatten(0, 1)

    def sizes(self) -> Tensor:
        return torch.tensor([[side * 16 for side in self.grid]] * 2)

    def features(self) -> Tensor:
        """What the library's text reads of both images, ``[2, tokens, width]``."""
        pixels = self.prompt()["pixel_values"]
        output = self.eager.get_image_features(pixels, self.sizes(), return_dict=True)
        return torch.stack(output.pooler_output)

    def staying(self, chosen: Tensor) -> Tensor:
        """Of patches, bool ``[2 x pictures, patches]``, the tokens, with all newlines."""
        order = torch.tensor(self.order())
        return (order == NEWLINE) | chosen.reshape(2, -1)[:, order]

    def reading(self, rows: Tensor) -> Tensor:
        """Features ``[2 x pictures, patches, width]`` as the library's text reads them."""
        order, features = torch.tensor(self.order()), self.features()
        patches = rows.reshape(2, -1, rows.shape[2])
        features[:, order != NEWLINE] = patches[:, order[order != NEWLINE]]
        return features

    def told(self, stays: Tensor, features: Tensor | None = None) -> Tensor:
        """The library's logits of prompts in which these tokens stay, bool ``[2, tokens]``."""
        features = self.features() if features is None else features
        words, logits = self.eager.get_input_embeddings()(self.prompt()["input_ids"]), []
        for row, image, tokens in zip(words, features, stays, strict=True):
            stream = torch.cat([row[:1], image[tokens], row[-2:]])[None]
            hidden = self.eager.model.language_model(inputs_embeds=stream).last_hidden_state
            logits.append(self.eager.lm_head(hidden))
        return torch.cat(logits)

    def optimized(self, recipe: str) -> tuple[View, tuple[int, ...]]:
        """The rewritten graph, and the image tokens that come to its first cut and go on there."""
        result = gw.optimize(self.graph, recipe, samples=[self.prompt()])
        return result.graph, result.report.passes[-1].result.sites[0].shape

    def check(self, view: View, expected: Tensor, **more: Tensor) -> None:
        """The graph gives that, of the prompt and ``more`` inputs, in ONNX Runtime too where it is
        one of ONNX."""
        asked = self.prompt() | more
        actual = [sweep(view, asked)["logits"]]
        if self.graph is not self.traced:
            run = gw.compile(view, backend="onnxruntime")
            actual.append(run(**asked)["logits"])
        for logits in actual:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next") / "model"
    family = FAMILIES["llava-next"]
    text = family.sizes["text_config"] | {"num_hidden_layers": 3}
    save(replace(family, sizes={**family.sizes, "text_config": text}), folder)
    return folder


@pytest.fixture(scope="module", params=GRIDS)
def images(request: pytest.FixtureRequest, folder: Path) -> Raster:
    """Of the largest square, unless a config names another shape."""
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    rows, columns = GRIDS[request.param]
    if rows == columns:
        view = gw.load(folder, cache=False)
        return Raster(model, (rows, columns), view, in_our_words(translated(view)))
    place = folder.parent / request.param
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    config["image_grid_pinpoints"] = [[rows * 16, columns * 16]]
    (place / "config.json").write_text(json.dumps(config))
    view = gw.load(place, cache=False)
    in_our_words(view)
    return Raster(model, (rows, columns), view, view)


def in_our_words(view: View) -> View:
    """Once, not in every test."""
    canonicalize(view)
    return view


def test_the_graph_and_its_layout_are_the_library_s(images: Raster) -> None:
    for view in {id(view): view for view in (images.traced, images.graph)}.values():
        read = view.copy()
        canonicalize(read)
        tokens = find_image_tokens(read, recognize(read))
        assert (tokens.tokens, tokens.pictures) == (len(images.order()), images.pictures)
        assert list(tokens.layout) == images.order() and tokens.newlines == images.newlines
    with torch.no_grad():
        expected = images.eager(**images.prompt(), image_sizes=images.sizes()).logits
    images.check(images.graph, expected)


# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_patches_stay_in_the_raster_and_all_newlines(images: Raster, name: str) -> None:
    view, counts = images.optimized(with_keep(name, 8 * images.pictures))
    assert counts == (len(images.order()), 8 * images.pictures + images.newlines)
    with torch.no_grad():
        chosen = METHODS[name](images.eager, images.pixels(), 8)
        expected = images.told(images.staying(chosen))
    images.check(view, expected)
    entry = kept_entry(view, images.prompt())
    assert entry is not None
    assert entry.cuts[0].kept == chosen[: images.pictures].flatten().nonzero().squeeze(1).tolist()


def test_dropped_patches_go_into_their_nearest(images: Raster) -> None:
    """In the picture that they are of; newlines are what they were."""
    view, _ = images.optimized(f"similarity{{keep={5 * images.pictures} merge=true}}")
    with torch.no_grad():
        chosen = unlike(images.eager, images.pixels(), 5)
        rows = merged(projected(images.eager, images.pixels()), chosen)
        expected = images.told(images.staying(chosen), images.reading(rows))
    images.check(view, expected)


def test_tokens_are_merged_in_the_tower(images: Raster) -> None:
    view, _ = images.optimized("tome{r=3}")
    inner = images.eager.model
    hidden = torch.zeros(2 * images.pictures, PATCHES, inner.vision_tower.config.hidden_size)
    chosen = torch.zeros(2 * images.pictures, PATCHES, dtype=torch.bool)
    with torch.no_grad():
        for row, picture in enumerate(images.pixels()):
            tokens, _, members = merged_in_tower(inner.vision_tower, picture, 3, 2)
            homes = [home - 1 for home, *_ in members[1:]]
            hidden[row, homes], chosen[row, homes] = tokens[1:], True
        features = images.reading(inner.multi_modal_projector(hidden))
        expected = images.told(images.staying(chosen), features)
    images.check(view, expected)


def test_aim_merges_patches_and_prunes_newlines_too(images: Raster) -> None:
    view, counts = images.optimized(f"aim{{merge={6 * images.pictures} prune_from=1 prune_to=2}}")
    assert counts[1] == 6 * images.pictures + images.newlines
    width = images.eager.config.text_config.hidden_size
    rows = torch.zeros(2 * images.pictures, PATCHES, width)
    chosen = torch.zeros(2 * images.pictures, PATCHES, dtype=torch.bool)
    with torch.no_grad():
        for row, x in enumerate(projected(images.eager, images.pixels())):
            vectors, homes = paired(x, 6)
            rows[row, homes], chosen[row, homes] = vectors, True
        cuts = {0: images.staying(chosen), 2: 0}
        expected = spoken(images.eager, images.text(), images.reading(rows), cuts, renumber=[0])
    images.check(view, expected)


def test_crops_share_out_by_the_thumbnail(images: Raster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph says the grid of its crops."""
    temperature = 0.01
    monkeypatch.setattr(globalcom2, "TEMPERATURE", temperature)
    view, counts = images.optimized("globalcom2{ratio=0.5}")
    assert counts[1] == 8 * images.pictures + images.newlines
    with torch.no_grad():
        scores = cls_logits(images.eager, images.pixels()).reshape(2, images.pictures, PATCHES)
        chosen = torch.stack([shared_out(row, 0.5, images.grid, temperature)[0] for row in scores])
        expected = images.told(images.staying(chosen))
    assert len(set(chosen[:, 1:].sum(2).flatten().tolist())) > 1, "crops of unequal counts"
    images.check(view, expected)
    with pytest.raises(BadInput, match="images are cut into {}x{} crops".format(*images.grid)):
        gw.plan(images.graph, "globalcom2{grid=9x9}")


def test_pictures_share_by_what_is_said_of_them(images: Raster) -> None:
    count = 5 * images.pictures
    view, counts = images.optimized(f"quota{{keep={count}}}")
    assert counts == (len(images.order()), count + images.newlines)
    said = torch.linspace(1, 0.2, images.pictures)
    said = torch.stack([said, said.flip(0)])
    chosen = dealt(said, count)
    per_picture = chosen.reshape(2, images.pictures, -1).sum(2)
    assert per_picture[0, 0] > per_picture[0, -1] < per_picture[1, -1], "unequal counts"
    with torch.no_grad():
        expected = images.told(images.staying(chosen))
    images.check(view, expected, **{RELEVANCE: said})


@pytest.mark.parametrize("name", ["uniform-tokens", "random-tokens"])
def test_baselines_choose_among_the_patches(images: Raster, name: str) -> None:
    patches = (torch.tensor(images.order()) != NEWLINE).nonzero().squeeze(1)
    places = list(range(1, len(patches), 2))
    if name == "random-tokens":
        places = random.Random(0).sample(range(len(patches)), len(patches) // 2)
    stays = torch.tensor(images.order()) == NEWLINE
    stays[patches[places]] = True
    view, _ = images.optimized(f"{name}{{keep=50%}}")
    with torch.no_grad():
        expected = images.told(stays.expand(2, -1))
    images.check(view, expected)


def test_a_cut_in_the_language_model_takes_newlines_as_tokens(images: Raster) -> None:
    """And so does one behind another cut; the scale of attention counts them."""
    half = len(images.order()) // 2
    view, counts = images.optimized(f"fastv{{layer=1 keep={half}}}")
    assert counts == (len(images.order()), half)
    with torch.no_grad():
        expected = spoken(images.eager, images.text(), images.features(), {1: half})
    images.check(view, expected)
    recipe = "fastervlm{keep=50%},uniform-tokens{keep=50%},keep-entropy{text=6}"
    _, counts = images.optimized(recipe)
    come = 8 * images.pictures + images.newlines
    assert counts == (len(images.order()) + 6, round(come / 2) + 6)


def test_all_tokens_are_the_same_graph(images: Raster) -> None:
    names = (
        "fastervlm", "vtc-cls{layers=2}", "ui-components", "quota", "uniform-tokens",
        "random-tokens",
    )  # fmt: skip
    recipe = ",".join(with_keep(name, PATCHES * images.pictures) for name in (*names, *KEPT))
    view, counts = images.optimized(f"{recipe},globalcom2{{ratio=1}}")
    assert counts[0] == counts[1]
    before = images.graph.copy()
    canonicalize(before)
    logits = [sweep(v, images.prompt())["logits"] for v in (before, view)]
    assert torch.equal(*logits)


def test_compare_tokens_asks_for_as_many_of_each_method(images: Raster) -> None:
    """Of the patches, with all newlines; no method is refused."""
    view = images.graph.copy()
    canonicalize(view)
    tokens = find_image_tokens(view, recognize(view))
    half = 8 * images.pictures + images.newlines
    counts = {}
    for method, _, recipe in comparing_tokens._recipes(tokens, ["50%"]):
        if method != comparing_tokens.BLIND:
            ((_, result),) = gw.plan(images.graph, recipe).passes
            counts[method] = result.sites[0].shape[1]
    assert {"globalcom2", "fastv{layer=1}", "similarity{merge=true}"} <= set(counts)
    others = {method: n for method, n in counts.items() if n != half}
    assert set(others) <= {"tome", "pyramid-drop", "visual-exit"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("diverse{keep=31}", r"keep=31 is not divisible among the \d pictures"),
        ("fopru{keep=30 strategy=row}", r"whole rows of 4 patches in each of \d pictures"),
        ("pool-frames{to=2x2}", "as one raster .* globalcom2, quota, .* among their patches$"),
        ("ts-llava", "not one after another, as frames of a video"),
    ],
)
def test_what_the_raster_has_no_room_for(images: Raster, recipe: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gw.optimize(images.graph, recipe, samples=[images.prompt()])


# --- images of files ------------------------------------------------------------------------------


def test_a_picture_of_any_shape_is_cut_into_the_graph_s_crops(
    images: Raster, tmp_path: Path
) -> None:
    (rows, columns), view = images.grid, images.traced
    assert view.source.notes[-1].startswith(
        f"images are of {rows * 16} x {columns * 16}, which are {len(images.order())} tokens"
    )
    picture = torch.arange(3 * 16 * 16 * rows * columns) % 251
    picture = picture.reshape(rows * 16, columns * 16, 3).to(torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "a.png")
    prepared = Preprocessing.of(view)
    crops = prepared.read(tmp_path / "a.png")
    assert crops.shape == (images.pictures, 3, 16, 16)
    whole = crops[1:].reshape(rows, columns, 3, 16, 16).permute(2, 0, 3, 1, 4)
    whole = whole.reshape(3, rows * 16, -1)
    std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (prepared.std, prepared.mean))
    back = (whole * std + mean) * 255
    torch.testing.assert_close(back.permute(1, 2, 0).round().to(torch.uint8), picture)
