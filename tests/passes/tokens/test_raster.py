"""Token passes where an image enters the text as one raster with newlines, as in LLaVA-NeXT.

What they give is held against the library's own model, which is told the tokens that stay.
"""

from __future__ import annotations

import importlib
import json
import shutil
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
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.vision import find_image_tokens
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.data.images import Preprocessing
from graphwright.tools.report.token_picture import kept_entry
from PIL import Image

transformers: Any = importlib.import_module("transformers")
SIDE, PATCHES = 4, 16
"""Patches along a picture's edge, and all of them."""
IMAGE, NEWLINE = 96, -1
GRIDS = {"square": (2, 2), "wide": (1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next") / "model"
    save(FAMILIES["llava-next"], folder)
    return folder


@pytest.fixture(scope="module", params=GRIDS)
def loaded(request: pytest.FixtureRequest, folder: Path) -> tuple[tuple[int, int], View]:
    """The graph for images of one shape: the largest square, unless a config names another."""
    rows, columns = GRIDS[request.param]
    if rows == columns:
        return (rows, columns), gw.load(folder, cache=False)
    place = folder.parent / request.param
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    config["image_grid_pinpoints"] = [[rows * 16, columns * 16]]
    (place / "config.json").write_text(json.dumps(config))
    return (rows, columns), gw.load(place, cache=False)


def raster(grid: tuple[int, int]) -> list[int]:
    """The patches of an image in the library's order: the thumbnail's, then row by row over all
    crops, each row with a newline."""
    rows, columns = grid
    order = list(range(PATCHES))
    for row in range(rows * SIDE):
        for column in range(columns * SIDE):
            crop = 1 + row // SIDE * columns + column // SIDE
            order.append(crop * PATCHES + row % SIDE * SIDE + column % SIDE)
        order.append(NEWLINE)
    return order


def prompt(grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    tokens = len(raster(grid))
    ids = torch.tensor([[5, *[IMAGE] * tokens, 7, 8], [11, *[IMAGE] * tokens, 12, 13]])
    pixels = torch.randn(2, 1 + grid[0] * grid[1], 3, 16, 16,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def by_the_library(folder: Path, grid: tuple[int, int], each: int) -> torch.Tensor:
    """Logits of prompts in which each picture has its ``each`` best patches by CLS attention."""
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    inputs, order = prompt(grid), torch.tensor(raster(grid))
    with torch.no_grad():
        flat = inputs["pixel_values"].flatten(0, 1)
        tower = model.model.vision_tower(flat, output_attentions=True, output_hidden_states=True)
        paid = tower.attentions[-2].mean(1)[:, 0, 1:]
        sizes = torch.tensor([[side * 16 for side in grid]] * 2)
        features = model.get_image_features(inputs["pixel_values"], sizes, return_dict=True)
        words = model.get_input_embeddings()(inputs["input_ids"])
        best = paid.topk(each, 1).indices.reshape(2, -1, each)
        logits = []
        for row, image in enumerate(features.pooler_output):
            chosen = {p * PATCHES + int(i) for p, part in enumerate(best[row]) for i in part}
            stays = torch.tensor([int(n) == NEWLINE or int(n) in chosen for n in order])
            stream = torch.cat([words[row, :1], image[stays], words[row, -2:]])[None]
            hidden = model.model.language_model(inputs_embeds=stream).last_hidden_state
            logits.append(model.lm_head(hidden))
    return torch.cat(logits)


def test_the_graph_and_its_layout_are_the_library_s(
    loaded: tuple[tuple[int, int], View], folder: Path
) -> None:
    grid, view = loaded
    for read in map(canonical, (view, translated(view))):
        images = find_image_tokens(read, recognize(read))
        assert (images.tokens, images.pictures) == (len(raster(grid)), 1 + grid[0] * grid[1])
        assert list(images.layout) == raster(grid) and images.newlines == grid[0] * SIDE
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    sizes = torch.tensor([[side * 16 for side in grid]] * 2)
    with torch.no_grad():
        expected = model(**prompt(grid), image_sizes=sizes).logits
    torch.testing.assert_close(sweep(view, prompt(grid))["logits"], expected, rtol=1e-4, atol=1e-5)


def canonical(view: View) -> View:
    read = view.copy()
    canonicalize(read)
    return read


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_fastervlm_keeps_patches_in_the_raster_and_its_newlines(
    loaded: tuple[tuple[int, int], View], folder: Path, kind: str
) -> None:
    grid, view = loaded
    graph = view if kind == "fx" else translated(view)
    result = gw.optimize(graph, "fastervlm{keep=25%}", samples=[prompt(grid)])
    pictures, newlines = 1 + grid[0] * grid[1], grid[0] * SIDE
    assert result.report.passes[-1].result.sites[0].shape[1] == 4 * pictures + newlines
    logits = sweep(result.graph, prompt(grid))["logits"]
    expected = by_the_library(folder, grid, 4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    entry = kept_entry(result.graph, prompt(grid))
    assert entry is not None and len(entry.cuts[0].kept) == 4 * pictures
    if kind == "onnx":
        run = gw.compile(result.graph, backend="onnxruntime")
        torch.testing.assert_close(run(**prompt(grid))["logits"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_patch_by_patch_is_refused(loaded: tuple[tuple[int, int], View]) -> None:
    _, view = loaded
    for recipe in ("diverse{keep=50%}", "vispruner{keep=50%}", "globalcom2{ratio=0.5}"):
        with pytest.raises(BadInput, match="or newlines stand among them"):
            gw.plan(view, recipe)


def test_a_picture_of_any_shape_is_cut_into_the_graph_s_crops(
    loaded: tuple[tuple[int, int], View], tmp_path: Path
) -> None:
    grid, view = loaded
    assert view.source.notes[-1].startswith(
        f"images are of {grid[0] * 16} x {grid[1] * 16}, which are {len(raster(grid))} tokens"
    )
    picture = torch.arange(3 * 16 * 16 * grid[0] * grid[1]) % 251
    picture = picture.reshape(grid[0] * 16, grid[1] * 16, 3).to(torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "a.png")
    prepared = Preprocessing.of(view)
    crops = prepared.read(tmp_path / "a.png")
    assert crops.shape == (1 + grid[0] * grid[1], 3, 16, 16)
    whole = crops[1:].reshape(*grid, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, grid[0] * 16, -1)
    std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (prepared.std, prepared.mean))
    back = (whole * std + mean) * 255
    torch.testing.assert_close(back.permute(1, 2, 0).round().to(torch.uint8), picture)
