"""What each way to prune image tokens costs and answers, as Markdown: ``TOKENS.md``.

``python -m graphwright.tools.bench.token_table [MODEL ...] [--samples N] [--keep SHARES]
[--only PASS ...] [--data zoo:NAME]`` runs ``compare-tokens --eval vqa`` on models of the zoo, or on
one that was trained anew and is asked what ``zoo:NAME`` is, and prints a table for each: accuracy
with its 95 % interval, on each type of question, and whether a method beats random and evenly
spread tokens. ``--times FILE`` prints a page of such tables with its column of prefill measured
anew and all else as it stands.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ...backends import compile as compile_model
from ...ir.core.errors import GraphwrightError
from ...ir.load.sources import load
from ...ir.structure.costs import MAC_CONVENTION
from ..data import calibration
from ..run.comparing_tokens import (
    BASELINE,
    BLIND,
    Comparison,
    Row,
    compare,
    find_images,
    one_prompt,
    prune,
)
from ..run.prefill import Stopwatch, clock_words

MODELS = ("zoo:tiny-llava", "zoo:tiny-llava-details", "zoo:tiny-llava-next", "zoo:tiny-video")
KEEP = "50%,25%,12.5%,6%"
SPREAD, SOURCE = "uniform-tokens", "source"
ROUNDS = 15
THREADS = 1
"""The processor's time of one thread is steady on a busy machine: see ``Stopwatch``."""
COLUMNS = ("keep", "method", "tokens", "MACs", "prefill", "accuracy")
Ratios = Mapping[tuple[str, str], float]
"""Of a share and a method, what a prompt takes by what it takes the source."""
Measure = Callable[[str, Sequence[tuple[str, str]]], Ratios]
"""Of a model, and shares and methods."""


def section(comparison: Comparison) -> Iterator[str]:
    """The table of one model, row by row, and what it says in words."""
    source, *rest = comparison.rows
    types = list(source.by_type)
    columns = [*COLUMNS, *types, "beats"]
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
    if row.method in (SOURCE, BASELINE, SPREAD, BLIND):
        return ""
    rivals = [r for r in rows if r.keep == row.keep and r.method in (BASELINE, SPREAD)]
    names = [r.method.removesuffix("-tokens") for r in rivals if row.interval[0] > r.quality]
    return ", ".join(names) or "neither"


# --- prefill alone -------------------------------------------------------------------------------


def renewed(page: str, measure: Measure) -> Iterator[str]:
    """A page, in its tables of the zoo's models the column of prefill as ``measure`` says, and all
    else as it is; rows of which nothing is said stay."""
    for part in filter(None, re.split(r"(?m)^(?=## )", page)):
        title, *lines = part.splitlines()
        model = title.removeprefix("## ")
        numbered = enumerate(lines if model.startswith("zoo:") else ())
        rows = {place: cells for place, line in numbered if (cells := _cells(line))}
        ratios = measure(model, [(c[0], c[1]) for c in rows.values()]) if rows else {}
        for place, cells in rows.items():
            ratio = ratios.get((cells[0], cells[1]))
            if ratio is not None:
                cells[COLUMNS.index("prefill")] = f"{ratio:.2f}"
                lines[place] = f"| {' | '.join(cells)} |"
        yield from (title, *lines)


def _cells(line: str) -> list[str]:
    """The cells of a table's row about a share of the tokens; none of another line."""
    cells = line[2:-2].split(" | ")
    return cells if re.fullmatch(r"[\d.]+%", cells[0]) and len(cells) > len(COLUMNS) else []


def ratios_of(model: str, rows: Sequence[tuple[str, str]]) -> Ratios:
    """Of shares and methods the prefill by the source's, of the source what it takes once more."""
    keeps = dict.fromkeys(keep for keep, method in rows if method not in (SOURCE, BLIND))
    only = {method.partition("{")[0] for _, method in rows}
    graph = load(model, cache=False)
    prompt = one_prompt(calibration.read(model, graph, samples=1).batches[0])
    graphs = prune(graph, find_images(graph), list(keeps), [prompt], [], progress=_told, only=only)
    compiled = partial(compile_model, backend="onnxruntime", threads=THREADS)
    stopwatch = Stopwatch(compiled(graph), prompt, THREADS, ROUNDS)
    return {(g.keep or "100%", g.method): stopwatch(compiled(g.view)).ratio for g in graphs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--keep", default=KEEP, help="shares of image tokens")
    parser.add_argument("--samples", type=int, default=400, help="questions")
    parser.add_argument("--only", nargs="*", default=(), help="names of passes")
    parser.add_argument("--data", help="the prompts of another model of the zoo")
    parser.add_argument("--times", type=Path, help="a page whose column of prefill is renewed")
    options = parser.parse_args(arguments)
    if options.times is not None:
        for line in renewed(options.times.read_text(), ratios_of):
            print(line, flush=True)
        return 0
    for model in options.models:
        try:
            comparison = compare(
                model, options.data or model, options.keep.split(","), vqa=True,
                samples=options.samples, rounds=ROUNDS, threads=THREADS, progress=_told,
                only=options.only,
            )  # fmt: skip
        except GraphwrightError as error:
            sys.stderr.write(f"error: {model}: {error}\n")
            return error.exit_code
        print(*section(comparison), sep="\n", flush=True)
    print(
        f"*tokens*: before the first cut and behind each. *MACs* and *prefill* (ONNX Runtime, one "
        f"prompt, {clock_words(THREADS)}, the median of {ROUNDS} rounds in turns with the "
        f"source): of the source's, the source's own in another session. {MAC_CONVENTION}. "
        "*beats*: the baselines whose accuracy is below the interval."
    )
    return 0


def _told(label: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{label} {done}/{total}   ")


if __name__ == "__main__":
    raise SystemExit(main())
