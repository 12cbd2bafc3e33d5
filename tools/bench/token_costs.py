"""What the token passes do to the costs of 7B models, beside the figures that their papers print.

``python -m graphwright.tools.bench.token_costs [--layers N]`` traces LLaVA-1.5-7B and LLaVA-NeXT-7B
(a thumbnail and four crops) on the meta device, without a weight, runs each pass on a copy of the
graph, and prices the language model's blocks as the rewritten graph's shapes say. With fewer layers
than 32 everything is scaled: shares stay the same where the pass cuts at the same part of the
depth.

One figure is not met: AIM prints 2.22 T FLOP for LLaVA-1.5-7B without the share that it merged to;
25 % is its default for video. Its other figures follow from
``4 n d^2 + 2 n^2 d + 3 n d m`` a block over its schedule (blocks 13 to 21): 8.18 T of all tokens,
1.03 T at 12.5 % (printed 1.00). At 25 % that is 1.55 T, as the graph says, at 50 % 2.59 T; 2.22 T
would be 41 %, which no halving of tokens gives. The setting behind it is not known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.structure.costs import MAC_CONVENTION, graph_costs
from ...ir.structure.recognize import recognize
from ...ir.structure.vision import find_image_tokens
from ...passes.base import Context
from ...passes.recipe import Recipe
from .cost_tables import FASTERVLM, GLOBALCOM, LAYERS, LLAVA, MEBI, NEXT, PDROP, VICUNA_7B

PATCHES = 576
IMAGE = 32000
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    "num_hidden_layers": 3,
}  # fmt: skip
"""CLIP-L/14-336, but for its depth: the tower is not priced."""
DYVTE = "DyVTE's exit, static, arXiv 2411.19628"


@dataclass(frozen=True)
class Figure:
    """One number of a paper, and what the rewritten graph is to be asked."""

    model: str
    recipe: str
    unit: str
    """``T MAC``, ``T FLOP``, ``MB`` of cache, or ``%`` of the MACs that are saved."""
    printed: float
    text: int
    """Text tokens beside the image's."""
    source: str

    def cost(self, macs: int, kv: int, before: int) -> float:
        return {
            "T MAC": macs / 1e12, "T FLOP": 2 * macs / 1e12, "MB": kv / MEBI,
            "%": 100 * macs / before - 100,
        }[self.unit]  # fmt: skip


FIGURES = (
    Figure(LLAVA, "", "T MAC", 3.82, 0, PDROP),
    Figure(LLAVA, "pyramid-drop", "T MAC", 1.78, 0, PDROP),
    Figure(NEXT, "", "T MAC", 20.83, 0, PDROP),
    Figure(NEXT, "pyramid-drop", "T MAC", 9.46, 0, PDROP),
    Figure(NEXT, "fastv{layer=2 keep=50%}", "T MAC", 10.6, 0, PDROP),
    Figure(NEXT, "", "T FLOP", 41.65, 0, GLOBALCOM),
    Figure(NEXT, "globalcom2{ratio=0.25}", "T FLOP", 9.60, 0, GLOBALCOM),
    Figure(NEXT, "", "MB", 1440, 0, FASTERVLM),
    Figure(NEXT, "fastervlm{keep=145}", "MB", 72.5, 0, FASTERVLM),
    Figure(LLAVA, "visual-exit{layer=12}", "%", -56, 64, DYVTE),
    Figure(LLAVA, "visual-exit{layer=16}", "%", -45, 64, DYVTE),
    Figure(LLAVA, "visual-exit{layer=20}", "%", -34, 64, DYVTE),
    Figure(LLAVA, "diverse{keep=12.5%}", "T MAC", float("nan"), 0, "no figure to compare with"),
    Figure(LLAVA, "aim{merge=12.5%}", "T FLOP", 1.00, 40, "AIM, arXiv 2412.03248"),
    Figure(LLAVA, "aim{merge=25%}", "T FLOP", 2.22, 40, "AIM, arXiv 2412.03248"),
)


def traced(crops: int, layers: int) -> View:
    """A LLaVA of Vicuna-7B's shape, canonical; its weights are shapes without numbers."""
    text = {**VICUNA_7B, "num_hidden_layers": layers}
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": text, "vision_config": VISION, "image_token_index": IMAGE,
        "image_token_id": IMAGE, "image_seq_length": PATCHES * crops,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "dtype": "float16",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="graphwright-costs-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        view = load(folder, allow_missing_weights=True, cache=False)
    canonicalize(view)
    return view


def priced(view: View, recipe: str, tokens: int) -> tuple[int, int]:
    """Multiply-accumulates and cache bytes of the language model's blocks behind the passes of a
    recipe; what scores compute of a block's queries and keys is among its blocks'."""
    copy = view.copy()
    for entry in Recipe.parse(recipe).steps if recipe else ():
        entry.pass_.run(Context(copy))
    structure = recognize(copy)
    costs = graph_costs(copy, {"batch": 1, "images": 1, "seq": tokens}, structure)
    first = find_image_tokens(copy, structure).language[0].index
    return sum(map(_total, costs.block_macs[first:])), _total(costs.kv_bytes)


def _total(count: int | None) -> int:
    if count is None:
        raise ValueError("a shape is open")
    return count


def rows(figures: Sequence[Figure], layers: int) -> list[tuple[Figure, float]]:
    """Each figure with what the rewritten graph says."""
    views: dict[str, View] = {}
    costs = []
    for figure in figures:
        crops = 5 if figure.model == NEXT else 1
        if figure.model not in views:
            views[figure.model] = traced(crops, layers)
        view, tokens = views[figure.model], PATCHES * crops + figure.text
        before, _ = priced(view, "", tokens)
        macs, kv = priced(view, _scaled(figure.recipe, layers), tokens)
        scale = 1 if figure.unit == "%" else LAYERS / layers
        costs.append((figure, scale * figure.cost(macs, kv, before)))
    return costs


def _scaled(recipe: str, layers: int) -> str:
    """The recipe for fewer layers: an exit at the same part of the depth."""
    name, _, number = recipe.partition("layer=")
    if name != "visual-exit{":
        return recipe
    return f"{name}layer={int(number.rstrip('}')) * layers // LAYERS}}}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="blocks of the language model")
    layers = parser.parse_args().layers
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "passes", "text", "graph", "printed", "unit", "where"):
        table.add_column(column, overflow="fold")
    for figure, graph in rows(FIGURES, layers):
        printed = "" if figure.printed != figure.printed else f"{figure.printed:g}"
        passes = figure.recipe or "all tokens"
        table.add_row(figure.model, passes, str(figure.text), f"{graph:.2f}", printed,
                      figure.unit, figure.source)  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{MAC_CONVENTION}. Blocks of the language model alone, {layers} traced; T FLOP is twice T "
        "MAC. What a score computes of a block's queries and keys counts too; papers leave it out."
    )


if __name__ == "__main__":
    main()
