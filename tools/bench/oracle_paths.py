"""CoLa's two shares: ``python -m graphwright.tools.bench.oracle_paths [SAMPLES [SIMULATIONS]]``.

For each of SAMPLES (64) beginnings of the test split, 64 tokens long, zoo:tiny-llama is asked for
the token that comes next, and a tree search tries SIMULATIONS (200) paths through its blocks for
that one sample, rewarded where the token is right (arXiv 2507.07996, lambda 5). **The search sees
the answer**: it is an oracle, and says how many answers are somewhere in the model, not what could
be had. Printed are the share of right samples for which a shorter path is right too, with its
length, and the share of wrong ones that some path repairs; once with skips and repeats, and once
with paths no longer than the model. Beside them the frozen path, which is what ships: ``cola`` and
``search-path`` on the calibration split, one path for all, by the words that come next and with no
answer in sight. With SIMULATIONS 0 there are these rows alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text, token_batches
from ...ir.run.sweep import sweep
from ...ir.structure.recognize import last_tower, recognize
from ...ir.structure.units import whole
from ...passes.depth.layer_tree import LayerTree
from ...passes.depth.path_runner import PathRunner, Places
from ...passes.manager import optimize
from ..evaluate.stats import wilson

TOKENS, PENALTY = 64, 5.0
LONGER = 1.5
"""Most blocks of a path, by those of the model. The paper's cap is not in it."""


@dataclass(frozen=True)
class Oracle:
    """What a search with the answer in sight came to for one sample."""

    right: bool
    """Whether the model itself is."""
    shortest: Places | None
    """The shortest path that is right; ``None`` where none of those tried is."""
    best_short: bool
    """Whether one that is right is no longer than the model."""


def oracle(
    view: View, batch: Mapping[str, torch.Tensor], answer: int, simulations: int, seed: int = 0
) -> Oracle:
    """Search the paths for one sample, a row of a canonical graph of words."""
    structure = recognize(view)
    units = whole(last_tower(structure))
    runner = PathRunner(view, structure, units, [batch], last=True)
    itself = tuple(range(len(units)))

    def reward(path: Places, shared: int) -> float:
        return float(int(runner.outputs(path, shared)[-1].argmax()) == answer)

    tree = LayerTree(len(units), round(LONGER * len(units)), PENALTY, reward, seed)
    tried = {**tree.search(simulations), itself: reward(itself, 0)}
    paths = sorted((path for path, value in tried.items() if value), key=lambda p: (len(p), p))
    return Oracle(
        bool(tried[itself]), paths[0] if paths else None,
        bool(paths) and len(paths[0]) <= len(units),
    )  # fmt: skip


def beginnings(view: View, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[count, TOKENS]`` and the tokens that come next ``[count]``."""
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    texts = [t for t in shipped_text(split) if len(t) > 900][:count]
    rows = token_batches(tokenizer, texts, batch=len(texts), longest=TOKENS + 1)[0]["input_ids"]
    return rows[:, :TOKENS], rows[:, TOKENS]


def accuracy(view: View, ids: torch.Tensor, answers: torch.Tensor) -> str:
    outputs = sweep(view, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    hits = int((outputs["logits"][:, -1].argmax(-1) == answers).sum())
    return share(hits, len(answers))


def share(hits: int, count: int) -> str:
    if not count:
        return "none of 0"
    low, high = wilson(hits, count)
    return f"{hits} of {count} = {hits / count:.2f} ({low:.2f} to {high:.2f})"


def print_oracle(outcomes: Sequence[Oracle], blocks: int) -> None:
    right = [o for o in outcomes if o.right]
    wrong = [o for o in outcomes if not o.right]
    lengths = [len(o.shortest) for o in right if o.shortest is not None]
    print(f"right by the model itself: {share(len(right), len(outcomes))}")
    print(f"right ones with a shorter path: {share(sum(n < blocks for n in lengths), len(right))}, "
          f"mean of the shortest {sum(lengths) / max(1, len(lengths)):.1f} of {blocks} blocks")
    print(f"wrong ones repaired: {share(sum(o.shortest is not None for o in wrong), len(wrong))}, "
          f"by no more blocks than it has {share(sum(o.best_short for o in wrong), len(wrong))}")


def main(samples: int, simulations: int) -> None:
    graph = load("zoo:tiny-llama", cache=False)
    view = graph.copy()
    canonicalize(view)
    blocks = len(last_tower(recognize(view)))
    ids, answers = beginnings(view, "test", samples)
    if simulations:
        outcomes = []
        for row, answer in zip(ids, answers.tolist(), strict=True):
            batch = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
            outcomes.append(oracle(view, batch, answer, simulations))
        print(f"{samples} samples, {simulations} paths each; the search saw the answers:")
        print_oracle(outcomes, blocks)
    learned, _ = beginnings(view, "calibration", 48)
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in torch.split(learned, 8)]  # fmt: skip
    print(f"frozen, without answers: whole {accuracy(view, ids, answers)}")
    for recipe in (f"cola{{max_path={blocks - 1}}}",
                   f"cola{{max_path={blocks} optional=true}}",
                   f"search-path{{max_path={blocks - 1}}}",
                   f"search-path{{max_path={blocks - 1} method=mcts}}"):  # fmt: skip
        done = optimize(graph, recipe, calibration=data, samples=data[:1])
        path = done.report.passes[0].result.notes[-1]
        print(f"{recipe}: {path}: {accuracy(done.graph, ids, answers)}")


if __name__ == "__main__":
    asked = [*map(int, sys.argv[1:]), *[64, 200][len(sys.argv) - 1 :]]
    main(*asked[:2])
