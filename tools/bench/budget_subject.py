"""What the benches of searches judge by: a model, its data in parts, and unseen data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import scenes
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import recognize
from ...ir.vocab.targets import find_target
from ...passes.checkpoint_store import Under
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ..data import calibration
from ..search.budget import Budget
from ..search.data import parts, unfitted
from ..search.judge import Judge
from ..search.menu import Menu
from ..search.points import Found
from ..search.rounds import Rounds
from ..search.search import KNOBS, ROUNDS, saving
from ..search.skips import graph_measures
from ..search.timing import Timing
from ..search.workers import Workers

Batch = Mapping[str, torch.Tensor]
ROWS, TEXT, PICTURES = 64, 128, 512
"""Rows of unseen data, tokens of a row of text, and rows of a classifier."""


class Kept(dict[str, Any]):
    """What was surveyed, in memory."""

    recall, keep = dict[str, Any].__getitem__, dict[str, Any].__setitem__


class Subject:
    """A model, its calibration data in parts, and unseen data to judge by."""

    def __init__(self, name: str, quick: bool = False, cache: bool = False) -> None:
        """With its key-value cache, or without, where all heads are among the candidates."""
        self.name = name
        self.graph = load(name, cache=cache)
        self.data = calibration.read(name, self.graph).batches
        self.source = self.graph.copy()
        canonicalize(self.source)
        self.structure = recognize(self.source)
        self.parts = parts(self.source, self.data, unfitted(name, self.graph, self.data))
        if quick:
            self.parts = replace(self.parts, fit=self.parts.fit[:1], judge=self.parts.judge[:2])
        self.unseen = Judge(self.source, self.structure, _unseen(name, self.graph))
        self.judge = Judge(self.source, self.structure, self.parts.judge)
        self.bytes = weight_bytes(self.source)
        self._surveyed = Kept()

    def optimized(self, recipe: str | Recipe) -> View:
        sample = {name: tensor[:1] for name, tensor in self.parts.judge[0].items()}
        return optimize(
            self.graph, recipe, samples=[sample], calibration=self.parts.fit, target="cpu"
        ).graph

    def menu(self, timing: Timing | None = None, budget: str = "") -> Menu:
        """All candidates, surveyed once; of image tokens where time is bounded, or the cache, by
        ``budget``."""
        measures = graph_measures(self.source, self.judge.batches[0])
        bounds = Budget.parse(budget or "bytes=100%")
        cache = bounds.limit_of("kv", measures)
        knobs = saving(bounds.bounded | ({"ms"} if timing else set()), KNOBS)
        return Menu.of(
            self.source, self.parts, self.judge, find_target("cpu"), knobs, lambda *_: None,
            Under(self._surveyed, f"{'timed' if timing else 'untimed'}, {' '.join(knobs)}"),
            timing, cache,
        )  # fmt: skip

    def search(
        self, budget: str, menu: Menu, refine: float = 0.0, workers: Workers | None = None
    ) -> Found:
        """What a search finds with a menu, refined for so many seconds."""
        return Rounds(
            self.graph, self.source, Budget.parse(budget), self.parts, menu, self.judge, ROUNDS,
            lambda *_: None, workers=workers, refine=refine,
        ).found()  # fmt: skip


def _unseen(name: str, graph: View) -> list[Batch]:
    if name == "zoo:tiny-vit":
        drawn = scenes.classified("test", PICTURES, 3, 64)
        return [{"pixel_values": pixels} for pixels, _ in drawn]
    if name == "zoo:tiny-llava":
        asked = scenes.questions("test", ROWS, 3, scenes.IMAGE)
        folder = graph.source.folder
        assert folder is not None
        return list(scenes.prompt_batches(asked, read_tokenizer(Path(folder)), batch=8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.jsonl"
        texts = [text for text in shipped_text("test") if len(text) > 6 * TEXT]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts[:ROWS]))
        return list(calibration.read(str(path), graph, samples=ROWS, length=TEXT).batches)
