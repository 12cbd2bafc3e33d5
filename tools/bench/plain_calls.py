"""``python -m graphwright.tools.bench.plain_calls``: modules traced as ``transformers`` calls them.

``gw.trace(model, kwargs=inputs)`` without a word of what varies, for ten decoders and five
encoder-decoders, small and of random weights: ids and a mask as a tokenizer gives them, padded at
the left, and for the second kind what the decoder has read. Each graph is held against its model on
other rows and lengths. Ends with 1 where one is not traced, or differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ...ir.core.errors import GraphwrightError
from ...ir.core.quiet import quiet
from ...ir.load.tracing.trace import trace
from ...ir.run.sweep import sweep
from ...ir.run.verify import difference
from .family_models import DECODERS, PAIRS
from .family_table import Family
from .showing import ended, growing

TRIED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "gpt-neox", "opt"
)  # fmt: skip
TRIED_PAIRS = ("t5", "bart", "marian", "mbart", "pegasus")
BOUND = 1e-5
"""Relative L2 between a graph and its model in float32."""


def texts(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Ids and mask ``[rows, tokens]``; the first row begins with two that are padding."""
    ids = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(rows: int, tokens: int, *, pair: bool) -> dict[str, torch.Tensor]:
    read = texts(rows, tokens)
    return read | {"decoder_input_ids": texts(rows, tokens - 2)["input_ids"]} if pair else read


def judge(family: Family, *, pair: bool) -> tuple[str, str, str]:
    """Inputs and outputs of the graph, the distance of its logits, and whether that holds."""
    import transformers

    lib: Any = transformers
    torch.manual_seed(0)
    model = getattr(lib, family.model)(getattr(lib, family.config)(**family.sizes)).eval()
    try:
        with quiet():
            view = trace(model, kwargs=inputs_of(2, 7, pair=pair))
    except GraphwrightError as error:
        return "", str(error), "no"
    other = inputs_of(3, 10, pair=pair)
    with torch.no_grad():
        expected = model(**other).logits
    gap = difference(expected, sweep(view, other)["logits"]).rel_l2
    names = f"{len(view.input_names())} in, {len(view.output_names())} out"
    return names, f"{gap:.1e}", "yes" if gap <= BOUND else "no"


def main() -> int:
    wrong: list[str] = []

    def rows() -> Iterable[Sequence[str]]:
        for known, tried, pair in ((DECODERS, TRIED, False), (PAIRS, TRIED_PAIRS, True)):
            for name in tried:
                cells = judge(known[name], pair=pair)
                wrong.extend([name] if cells[-1] == "no" else [])
                yield name, *cells

    columns = ("family", "graph", "rel. L2 on other sizes", "holds")
    ended(lambda console: console.print(growing("gw.trace(model, kwargs=inputs)", columns, rows())))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
