"""What each way to prune image tokens costs and answers, as Markdown: ``TOKENS.md``.

``python -m graphwright.tools.bench.token_table [MODEL ...] [--samples N] [--keep SHARES]
[--only PASS ...]`` runs ``compare-tokens --eval vqa`` on models of the zoo and prints a table for
each: accuracy with its 95 % interval, on each type of question, and whether a method beats random
and evenly spread tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from ...ir.core.errors import GraphwrightError
from ...ir.structure.costs import MAC_CONVENTION
from ..run.comparing_tokens import BASELINE, BLIND, Comparison, Row, compare

MODELS = ("zoo:tiny-llava", "zoo:tiny-llava-details", "zoo:tiny-llava-next", "zoo:tiny-video")
KEEP = "50%,25%,12.5%,6%"
SPREAD = "uniform-tokens"
ROUNDS = 15


def section(comparison: Comparison) -> Iterator[str]:
    """The table of one model, row by row, and what it says in words."""
    source, *rest = comparison.rows
    types = list(source.by_type)
    columns = ["keep", "method", "tokens", "MACs", "prefill", "accuracy", *types, "beats"]
    yield f"## {comparison.model}"
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    keeps = list(dict.fromkeys(row.keep for row in rest))
    rest.sort(key=lambda row: (keeps.index(row.keep), -row.quality))
    for row in (source, *rest):
        low, high = row.interval
        cells = [
            row.keep or "100%", row.method, " ".join(map(str, row.tokens)),
            f"{row.macs / source.macs:.0%}", f"{row.prefill_ratio:.2f}",
            f"{row.quality:.1%} ({100 * low:.1f} to {100 * high:.1f})",
            *(f"{row.by_type[kind]:.0%}" for kind in types), beaten(row, rest),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""
    for note in comparison.notes:
        yield f"* {note}"
    for recipe, reason in comparison.refused:
        yield f"* not run: `{recipe}`: {reason}"
    yield ""


def beaten(row: Row, rows: Sequence[Row]) -> str:
    """Of random and evenly spread tokens those whose accuracy is below the row's interval."""
    if row.method in ("source", BASELINE, SPREAD, BLIND):
        return ""
    rivals = [r for r in rows if r.keep == row.keep and r.method in (BASELINE, SPREAD)]
    names = [r.method.removesuffix("-tokens") for r in rivals if row.interval[0] > r.quality]
    return ", ".join(names) or "neither"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--keep", default=KEEP, help="shares of image tokens")
    parser.add_argument("--samples", type=int, default=400, help="questions")
    parser.add_argument("--only", nargs="*", default=(), help="names of passes")
    options = parser.parse_args(arguments)
    for model in options.models:
        try:
            comparison = compare(
                model, model, options.keep.split(","), vqa=True, samples=options.samples,
                rounds=ROUNDS, progress=_told, only=options.only,
            )  # fmt: skip
        except GraphwrightError as error:
            sys.stderr.write(f"error: {model}: {error}\n")
            return error.exit_code
        print(*section(comparison), sep="\n", flush=True)
    print(
        f"*tokens*: before the first cut and behind each. *MACs* and *prefill* (ONNX Runtime, one "
        f"prompt, the median of {ROUNDS} pairs of runs, the source's right before): of the "
        f"source's. {MAC_CONVENTION}. *beats*: the baselines whose accuracy is below the interval."
    )
    return 0


def _told(label: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{label} {done}/{total}   ")


if __name__ == "__main__":
    raise SystemExit(main())
