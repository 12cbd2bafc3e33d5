"""Passes over the frames of a video against the library's modules, frame by frame."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.run.sweep import sweep
from torch import Tensor
from torch.nn import functional

from .llava import (
    FRAMES,
    IMAGE,
    PATCHES,
    Batch,
    Models,
    check_in_onnx_runtime,
    close,
    decoded,
    projected,
    prompts,
    spoken,
    with_past,
)

SIDE, WIDTH = 4, 24
TOKENS = FRAMES * PATCHES
KINDS = ("fx", "onnx")


def asked(batch: int, seed: int = 0) -> Batch:
    return prompts(batch, seed, pictures=FRAMES)


# --- what the text reads --------------------------------------------------------------------------


def pooled(models: Models, pixels: Tensor, frames: int, side: tuple[int, int]) -> Tensor:
    x = projected(models.eager, pixels.flatten(0, 1)).reshape(-1, FRAMES, SIDE, SIDE, WIDTH)
    small = functional.adaptive_avg_pool3d(x.permute(0, 4, 1, 2, 3), (frames, *side))
    return small.permute(0, 2, 3, 4, 1).flatten(1, 3)


def sampled(models: Models, pixels: Tensor, count: int, thumbnail: int) -> Tensor:
    x = projected(models.eager, pixels.flatten(0, 1)).reshape(-1, TOKENS, WIDTH)
    x = x[:, torch.linspace(0, TOKENS - 1, count).round().long()]
    if not thumbnail:
        return x
    rows, columns = {2: (2, 1), 4: (2, 2)}[thumbnail]
    picture = torch.zeros(len(pixels), 3, 32, 32)
    high, wide = 32 // rows, 32 // columns
    for place, frame in enumerate(torch.linspace(0, FRAMES - 1, thumbnail).round().long()):
        top, left = place // columns * high, place % columns * wide
        cell = functional.interpolate(pixels[:, frame], (high, wide), mode="area")
        picture[:, :, top : top + high, left : left + wide] = cell
    return torch.cat([x, projected(models.eager, picture)], 1)


def regions(
    models: Models, pixels: Tensor, frames: int, middle: int, region: float, fast: int,
    halve: bool = True,
) -> Tensor:  # fmt: skip
    """Video by video, frame by frame."""
    whole = []
    for video in pixels:
        tokens = projected(models.eager, video)
        vision = models.eager.model.vision_tower(video, output_attentions=True)
        paid = vision.attentions[-2].mean(1)[:, 0, 1:]
        mean = tokens.mean(1)
        alike = functional.cosine_similarity(mean[:-1], mean[1:], dim=1)
        slow = [0, *sorted((alike.topk(frames - 1, largest=False).indices + 1).tolist())]
        parts = []
        for frame in [*slow, *(i * FRAMES // middle for i in range(middle))]:
            grid, scores = tokens[frame].reshape(SIDE, SIDE, WIDTH), paid[frame].reshape(SIDE, SIDE)
            if halve:
                grid, scores = (x.unflatten(1, (-1, 2)).amax(2) for x in (grid, scores))
            rows, columns = scores.shape
            high, wide = (round(side * math.sqrt(region)) for side in (rows, columns))
            best = scores.flatten().topk(int(rows * columns * region)).indices
            top = int((best // columns).float().mean()) - high // 2
            left = int((best % columns).float().mean()) - wide // 2
            top, left = min(max(top, 0), rows - high), min(max(left, 0), columns - wide)
            parts.append(grid[top : top + high, left : left + wide].flatten(0, 1))
        if fast:
            grids = tokens.reshape(FRAMES, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
            parts.append(functional.adaptive_avg_pool2d(grids, fast).flatten(2).mT.flatten(0, 1))
        whole.append(torch.cat(parts))
    return torch.stack(whole)


READ: dict[str, Callable[[Models, Tensor], Tensor]] = {
    "pool-frames{to=2x2}": lambda m, p: pooled(m, p, FRAMES, (2, 2)),
    "pool-frames{to=4x3x2}": lambda m, p: pooled(m, p, 4, (3, 2)),
    "pool-frames{to=3x4x4}": lambda m, p: pooled(m, p, 3, (4, 4)),
    "ts-llava{frames=20 thumbnail=4}": lambda m, p: sampled(m, p, 20, 4),
    "ts-llava{frames=10% thumbnail=2}": lambda m, p: sampled(m, p, 10, 2),
    "ts-llava{frames=7 thumbnail=0}": lambda m, p: sampled(m, p, 7, 0),
    "free-video{frames=3 region=0.6 middle=2 fast=2}": lambda m, p: regions(m, p, 3, 2, 0.6, 2),
    "free-video{frames=1 region=0.8 middle=0 fast=1}": lambda m, p: regions(m, p, 1, 0, 0.8, 1),
    "free-video{frames=4 region=0.3 middle=0 fast=0 halve=false}":
        lambda m, p: regions(m, p, 4, 0, 0.3, 0, halve=False),
    "free-video{frames=2 region=1 middle=1 fast=0}": lambda m, p: regions(m, p, 2, 1, 1.0, 0),
}  # fmt: skip
IN_BOTH = (
    "pool-frames{to=4x3x2}", "ts-llava{frames=20 thumbnail=4}",
    "free-video{frames=3 region=0.6 middle=2 fast=2}",
)  # fmt: skip


def shorter(batch: Batch, count: int) -> Batch:
    """The prompt with so many placeholders in each row."""
    rows = []
    for ids in batch["input_ids"]:
        first = int((ids == IMAGE).long().argmax())
        rows.append(torch.cat([ids[: first + count], ids[first + TOKENS :]]))
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def expected_logits(models: Models, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Logits of the library's model, and which of them are of no padding."""
    with torch.no_grad():
        features = READ[name](models, batch["pixel_values"])
        short = shorter(batch, features.shape[1])
        logits = spoken(models.eager, short, features, {})
    return logits, short["attention_mask"].bool()


@pytest.mark.parametrize("name", READ)
def test_the_text_reads_what_is_made_of_the_frames(videos: Models, name: str) -> None:
    """Each pass in both kinds of graph; on 200 videos where what is read depends on them."""
    for kind in KINDS if name in IN_BOTH else ("onnx",):
        view = gw.optimize(videos.plain[kind], name, samples=[asked(2)]).graph
        many = kind == "fx" and "middle=2" in name
        for seed in range(5 if many else 1):
            batch = asked(40 if many else 5, seed)
            expected, real = expected_logits(videos, batch, name)
            close(sweep(view, batch)["logits"], expected, real)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_bit_identical(videos: Models, kind: str) -> None:
    """No pass changes the graph: the next one finds all tokens there."""
    batch, graph = asked(3), videos.plain[kind]
    raised = graph.copy()
    canonicalize(raised)
    after = gw.optimize(
        graph,
        "pool-frames{to=6x4x4},pool-frames{to=4x4},ts-llava{frames=100% thumbnail=0},"
        "free-video{frames=6 region=1 middle=0 fast=0 halve=false},intp-video{factor=1}",
        samples=[batch],
    )
    assert torch.equal(sweep(after.graph, batch)["logits"], sweep(raised, batch)["logits"])
    for step in after.report.passes:
        assert "the graph stays as it is" in step.result.notes[-1]


def test_a_cut_inside_the_language_model_follows(videos: Models) -> None:
    """What is left of a video is counted on from there."""
    batch, outputs = asked(3), []
    for graph in videos.plain.values():
        recipe = "pool-frames{to=2x2},fastv{layer=2 keep=25%},keep-entropy{text=6}"
        pruned = gw.optimize(graph, recipe, samples=[batch])
        sites = [p.result.sites[0].shape for p in pruned.report.passes]
        assert sites == [(TOKENS, 24), (24, 6), (TOKENS + 6, 24 + 6)]
        outputs.append(sweep(pruned.graph, batch)["logits"])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


# --- steps with a cache, ONNX Runtime -------------------------------------------------------------

STEPS = 12
"""``bench.token_steps`` goes 32, with all methods."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("fx", "pool-frames{to=4x3x2}"), ("onnx", "ts-llava{frames=20 thumbnail=4}"),
        ("onnx", "free-video{frames=3 region=0.6 middle=2 fast=2}"),
    ],
)  # fmt: skip
def test_steps_after_a_video(videos: Models, kind: str, name: str) -> None:
    """As one run over prompt and words with the same tokens; batches of 1 and 4."""
    graph, view = videos.cached[kind], None
    for batch, steps in ((4, STEPS), (1, 3)):
        prompt = asked(batch, 3)
        words = torch.randint(1, IMAGE, (batch, steps), generator=torch.Generator().manual_seed(1))
        view = view or gw.optimize(graph, name, samples=[with_past(graph, prompt)]).graph
        with torch.no_grad():
            features = READ[name](videos, prompt["pixel_values"])
            short = shorter(prompt, features.shape[1])
            whole = {
                "input_ids": torch.cat([short["input_ids"], words], 1),
                "attention_mask": torch.cat([short["attention_mask"], torch.ones_like(words)], 1),
            }
            expected = spoken(videos.eager, whole, features, {})
        logits, lengths = decoded(view, prompt, words)
        assert set(lengths) == {short["input_ids"].shape[1]}
        close(logits, expected[:, -steps - 1 :])


@pytest.mark.parametrize(
    ("name", "kind", "cache"),
    [
        ("pool-frames{to=4x3x2}", "onnx", True), ("ts-llava{frames=20 thumbnail=4}", "fx", True),
        ("ts-llava{frames=20 thumbnail=4}", "onnx", False),
        ("free-video{frames=3 region=0.6 middle=2 fast=2}", "onnx", True),
        ("intp-video{factor=2}", "onnx", True),
    ],
)  # fmt: skip
def test_onnx_runtime_gives_the_same(videos: Models, name: str, kind: str, cache: bool) -> None:
    """For a prompt and a step after it, by a graph without a shape that depends on data."""
    graph = (videos.cached if cache else videos.plain)[kind]
    check_in_onnx_runtime(graph, name, asked(4, 3), steps=int(cache))


# --- rotary positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["ntk", "linear"])
def test_rotary_positions_are_stretched(videos: Models, scaling: str) -> None:
    """As the library's own, by a base that is ``factor^(d / (d - 2))`` times as large, or places
    divided by it."""
    batch = asked(3)
    rotary = videos.eager.model.language_model.rotary_emb
    before = rotary.inv_freq
    width = 2 * len(before)
    base = 10000.0 * (3 ** (width / (width - 2)) if scaling == "ntk" else 1)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    stretched = base**-exponents / (1 if scaling == "ntk" else 3)
    with torch.no_grad():
        features = projected(videos.eager, batch["pixel_values"].flatten(0, 1))
        rotary.inv_freq = stretched.to(before.dtype)
        try:
            expected = spoken(videos.eager, batch, features.reshape(-1, TOKENS, WIDTH), {})
        finally:
            rotary.inv_freq = before
    for graph in videos.plain.values():
        recipe = f"intp-video{{factor=3 scaling={scaling}}}"
        after = gw.optimize(graph, recipe, samples=[batch])
        assert len(after.report.passes[0].result.sites) == 1
        logits = sweep(after.graph, batch)["logits"]
        close(logits, expected, batch["attention_mask"].bool())
        assert (sweep(graph, batch)["logits"] - logits).abs().max() > 0.01


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("pool-frames{to=4}", "neither frames x rows x columns, as 16x12x12, nor a grid"),
        ("pool-frames{to=4x0x2}", "to=4x0x2 is neither"),
        ("pool-frames{to=8x2x2}", "a video is 6x4x4 here, frames x rows x columns"),
        ("ts-llava{frames=0%}", "frames=0% must be above 0 %"),
        ("ts-llava{frames=97}", "frames=97 of 96 image tokens"),
        ("ts-llava{thumbnail=1}", "thumbnail=1 must be 0, or at least 2"),
        ("ts-llava{thumbnail=8}", "thumbnail=8: a video has 6 frames here"),
        ("ts-llava{thumbnail=6}", "32 x 32 pixels cannot be cut into 3 x 2 equal cells"),
        ("ts-llava{frames=90 thumbnail=4}", "106 tokens would come of a video's 96"),
        ("free-video{guide=prompt}", "needs a text tower that was trained with the vision tower"),
        ("free-video{frames=7}", "frames=7 and middle=5: a video has 6 frames here"),
        ("free-video{frames=0 fast=0}", "frames or fast above it"),
        ("free-video{region=0}", "region=0 must be above 0 and at most 1"),
        ("free-video{fast=5}", "fast=5: a frame is 4 x 4 here"),
        ("free-video{frames=6 middle=6}", "tokens would come of a video's 96"),
        ("intp-video{factor=0.5}", "factor=0.5 must be from 1 to 1000"),
        ("uniform-tokens{keep=8},pool-frames{to=2x2}", "put pool-frames first"),
        ("pool-frames{to=2x2},fastervlm{keep=6}", "pruned before already"),
    ],
)
def test_bad_options(videos: Models, recipe: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        gw.optimize(videos.plain["onnx"], recipe, samples=[asked(2)])


@pytest.mark.parametrize("name", ["pool-frames{to=2x2}", "ts-llava", "free-video"])
def test_one_picture_is_no_video(models: Models, name: str) -> None:
    with pytest.raises(BadInput, match="an image is one picture here, and no video"):
        gw.optimize(models.plain["fx"], name, samples=[prompts(2)])
