"""Frames get tokens by what is said of them, counted out one by one; the text reads these."""

from __future__ import annotations

import re

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import RELEVANCE
from graphwright.passes.tokens.quota import spread
from torch import Tensor

from .llava import (
    FRAMES,
    PATCHES,
    Models,
    check_in_onnx_runtime,
    chosen_in,
    close,
    places,
    projected,
    prompts,
    spoken,
)
from .reference_scores import dealt

KEPT = 20


def told(rows: int, seed: int) -> Tensor:
    """Probabilities of all sizes; of each four videos some frames of one are alike and some of
    another of no interest."""
    drawn = torch.rand(rows, FRAMES, generator=torch.Generator().manual_seed(seed)) ** 3
    drawn[::4, 1:3], drawn[3::4, ::2] = drawn[::4, :1], 0
    return drawn


@pytest.mark.parametrize(("kind", "power"), [("fx", 2), ("onnx", 1)])
def test_frames_share_by_what_is_said_of_them(videos: Models, kind: str, power: int) -> None:
    batch = prompts(40, pictures=FRAMES)
    recipe = f"quota{{keep={KEPT} power={power}}}"
    view = gw.optimize(videos.plain[kind], recipe, samples=[prompts(2, pictures=FRAMES)]).graph
    assert view.input_names() == (*videos.plain[kind].input_names(), RELEVANCE)
    for seed in range(5):
        relevance = told(40, seed)
        chosen = dealt(relevance, KEPT, power=power)
        asked = {**batch, RELEVANCE: relevance}
        assert torch.equal(chosen_in(view, asked), places(chosen))
    with torch.no_grad():
        features = projected(videos.eager, batch["pixel_values"].flatten(0, 1))
        features = features.reshape(40, FRAMES * PATCHES, -1)
        expected = spoken(videos.eager, batch, features, {0: chosen}, renumber=True)
    close(sweep(view, asked)["logits"][:, -KEPT:], expected[:, -KEPT:])
    counts = chosen_in(view, batch).div(PATCHES, rounding_mode="floor")
    assert torch.bincount(counts[0]).tolist() == [4, 4, 3, 3, 3, 3], "nothing is said: all alike"


def test_tokens_are_spread_over_a_frame() -> None:
    """Of four the corners' distances, and no place twice."""
    order = spread(5, 5)
    assert sorted(order.tolist()) == list(range(25)) and int(order[12]) == 0
    assert {i for i in range(25) if order[i] < 5} == {0, 4, 12, 20, 24}
    assert spread(1, 1).tolist() == [0]


def test_all_kept_is_bit_identical_and_onnx_runtime_takes_it(videos: Models) -> None:
    batch = prompts(3, pictures=FRAMES)
    raised = videos.plain["fx"].copy()
    canonicalize(raised)
    whole = gw.optimize(videos.plain["fx"], "quota{keep=100%}", samples=[batch]).graph
    assert torch.equal(sweep(whole, batch)["logits"], sweep(raised, batch)["logits"])
    check_in_onnx_runtime(videos.cached["onnx"], f"quota{{keep={KEPT}}}", batch, steps=2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quota{keep=0}", "keep=0 must be at least 1"),
        ("quota{keep=97}", "keep=97 of 96 image tokens"),
        ("quota{keep=8 power=-1}", "power=-1 must be from 0 to 16"),
        ("uniform-tokens{keep=24},quota{keep=8}", "put quota first"),
    ],
)
def test_bad_options(videos: Models, recipe: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        gw.optimize(videos.plain["fx"], recipe, samples=[prompts(2, pictures=FRAMES)])


def test_one_picture_has_no_frames(models: Models) -> None:
    with pytest.raises(BadInput, match="an image is one picture here, and no video"):
        gw.optimize(models.plain["fx"], "quota{keep=8}", samples=[prompts(2)])
