"""The cost model beside the figures that papers on visual tokens print.

``python -m graphwright.tools.bench.cost_tables`` traces the decoder of LLaVA-1.5-7B and
LLaVA-NeXT-7B (Vicuna 7B both) on the meta device, without a weight, and
prices its blocks at the tokens that each method leaves in each layer. The papers count image tokens
alone; so does this.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.structure.costs import MAC_CONVENTION, graph_costs, layer_macs

LAYERS, WIDTH, INNER = 32, 4096, 11008
VICUNA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "dtype": "float16",
}  # fmt: skip
LLAVA, NEXT = "LLaVA-1.5-7B", "LLaVA-NeXT-7B"
MEBI = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One number of a paper, and what the cost model says."""

    model: str
    what: str
    tokens: tuple[int, ...]
    """Image tokens in each layer."""
    unit: str
    printed: float
    source: str

    def computed(self, macs: Mapping[int, Sequence[int]], kv: Mapping[int, Sequence[int]]) -> float:
        """In the figure's unit, from MACs and cache bytes by layer at each number of tokens."""
        table = kv if self.unit == "MB" else macs
        total = sum(table[count][layer] for layer, count in enumerate(self.tokens))
        return {"T MAC": total / 1e12, "T FLOP": 2 * total / 1e12, "MB": total / MEBI}[self.unit]


def whole(tokens: int) -> tuple[int, ...]:
    """Every token in every layer."""
    return (tokens,) * LAYERS


def pyramid(tokens: int) -> tuple[int, ...]:
    """PyramidDrop's default: half of the tokens leave before layers 8, 16 and 24."""
    return tuple(tokens >> layer // 8 for layer in range(LAYERS))


def fastv(tokens: int, layer: int = 2, ratio: float = 0.5) -> tuple[int, ...]:
    """FastV: all tokens up to ``layer``, then the share ``1 - ratio``."""
    return (tokens,) * layer + (round(tokens * (1 - ratio)),) * (LAYERS - layer)


PDROP = "PyramidDrop, arXiv 2410.17247"
GLOBALCOM = "GlobalCom², arXiv 2501.05179"
FASTERVLM = "FasterVLM, arXiv 2412.01818"
FIGURES = (
    Figure(LLAVA, "all tokens", whole(576), "T MAC", 3.82, PDROP),
    Figure(LLAVA, "PyramidDrop, its default", pyramid(576), "T MAC", 1.78, PDROP),
    Figure(NEXT, "all tokens", whole(2880), "T MAC", 20.8, PDROP),
    Figure(NEXT, "PyramidDrop, its default", pyramid(2880), "T MAC", 9.5, PDROP),
    Figure(NEXT, "FastV, K=2 R=50 %", fastv(2880), "T MAC", 10.6, PDROP),
    Figure(NEXT, "all tokens", whole(2880), "T FLOP", 41.7, GLOBALCOM),
    Figure(NEXT, "cache, all tokens", whole(2880), "MB", 1440, FASTERVLM),
    Figure(NEXT, "cache, 145 tokens", whole(145), "MB", 72.5, FASTERVLM),
)


def decoder(layers: int = LAYERS) -> View:
    """Vicuna 7B's graph, canonical; its weights are shapes without numbers."""
    with tempfile.TemporaryDirectory(prefix="graphwright-costs-") as folder:
        config = {**VICUNA_7B, "num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        view = load(folder, allow_missing_weights=True, cache=False)
    canonicalize(view)
    return view


def priced(
    view: View, figures: Sequence[Figure] = FIGURES
) -> list[tuple[Figure, float, float]]:
    """Each figure with what the graph costs and what the papers' formula gives.

    Blocks alone are priced: papers leave out embeddings and the head. The blocks of a shorter
    decoder stand for those of the whole one, in turns.
    """
    counts = sorted({count for figure in figures for count in figure.tokens})
    macs: dict[int, list[int]] = {}
    kv: dict[int, list[int]] = {}
    for count in counts:
        costs = graph_costs(view, {"batch": 1, "seq": count})
        if costs.kv_bytes is None or None in costs.block_macs:
            raise ValueError(f"the decoder's shapes are open at {count} tokens")
        blocks = [m for m in costs.block_macs if m is not None]
        macs[count] = [blocks[layer % len(blocks)] for layer in range(LAYERS)]
        kv[count] = [costs.kv_bytes // len(blocks)] * LAYERS
    formula = {count: [layer_macs(count, WIDTH, INNER)] * LAYERS for count in counts}
    return [(f, f.computed(macs, kv), f.computed(formula, kv)) for f in figures]


def main() -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "what", "tokens by layer", "graph", "f(n)", "printed", "unit", "where"):
        table.add_column(column, overflow="fold")
    for figure, graph, formula in priced(decoder()):
        runs = [f"{n} x{figure.tokens.count(n)}" for n in dict.fromkeys(figure.tokens)]
        by_formula = "-" if figure.unit == "MB" else f"{formula:.2f}"
        table.add_row(figure.model, figure.what, ", ".join(runs), f"{graph:.2f}", by_formula,
                      f"{figure.printed:g}", figure.unit, figure.source)  # fmt: skip
    console = Console(width=150)
    console.print(table)
    console.print(f"{MAC_CONVENTION}. Image tokens only; gated MLP; 1 MB of cache is 2^20 bytes, "
                  "keys and values in float16. f(n) = 4 n d^2 + 2 n^2 d + 3 n d m.")  # fmt: skip


if __name__ == "__main__":
    main()
