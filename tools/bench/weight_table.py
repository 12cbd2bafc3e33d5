"""Ways to store weights in few bits, side by side: quality, true size, time.

``python -m graphwright.tools.bench.weight_table [--model zoo:tiny-llama] [--bits 4,3]
[--methods quantize,gptq] [--before none,rotate] [--behind none,eora-16] [--samples N]
[--rows FILE.md]`` measures a row for each combination: perplexity and KL to the source with their
95 % intervals, recall, stored bits per weight of the linears that are rewritten, processor seconds
of the recipe (of one with a path, what any run begins with counts twice). It prints what stands
behind one quantizer side by side, and which methods round no better than to nearest. Graphs are
judged in ONNX Runtime. A tied head stays as it is, before a rotation too. With ``--rows`` each row
goes to the end of that file as it comes, and those that it holds are not measured again, so that a
run that was stopped goes on (``WEIGHT_ROWS.md``; ``WEIGHTS.md`` says what is to be seen in it).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ...ir.core.errors import BadInput, near_misses
from .showing import ended, growing
from .weight_judge import Judge, Start

METHODS = {
    "quantize": "quantize{{bits={bits} group=32 embeddings=keep{keep}}}",
    "quantize-asym": "quantize{{bits={bits} group=32 symmetric=false embeddings=keep{keep}}}",
    "easyquant": "easyquant{{bits={bits} group=32{keep}}}",
    "hqq": "hqq{{bits={bits} group=32{keep}}}",
    "finequant": "finequant{{bits={bits} group=32{keep}}}",
    "awq": "awq{{bits={bits} group=32{keep}}}",
    "gptq": "gptq{{bits={bits} group=32{keep}}}",
    "autoround": "autoround{{bits={bits} group=32 steps=50{keep}}}",
    "aqlm": "aqlm{{bits={bits}{keep}}}",
}
NARROW = {"aqlm": ("2", "3", "4")}
"""The widths of methods that have not all of them."""
BEFORE = {"none": "", "rotate": "rotate,"}
BEHIND = {
    "none": "",
    "svd-16": ",svd-compensate{rank=16}",
    "eora-8": ",eora{rank=8}",
    "eora-16": ",eora{rank=16}",
    "eora-32": ",eora{rank=32}",
    "eora-16-4-bit": ",eora{rank=16 factor_bits=4}",
    "eora-32-4-bit": ",eora{rank=32 factor_bits=4}",
}
COLUMNS = (
    "bits", "method", "before", "behind", "perplexity", "KL", "recall", "bits a weight", "seconds"
)  # fmt: skip
NAMED = 4
"""Columns that say which row it is."""
BASELINES = ("quantize", "quantize-asym")
Row = tuple[str, ...]


def rows(
    judge: Judge, bits: Sequence[str], methods: Sequence[str], before: Sequence[str],
    behind: Sequence[str], known: Container[Row] = (),
) -> Iterator[Row]:  # fmt: skip
    """The rows but those that are known; what goes behind one recipe follows each other."""
    if ("-", "source", "-", "-") not in known:
        yield "-", "source", "-", "-", *judge.figures(judge.graph), "-", "-"
    for first, width, method in itertools.product(before, bits, methods):
        if width not in NARROW.get(method, (width,)):
            continue
        keep = " exclude=lm_head" if first == "rotate" else ""
        start = Start(judge, BEFORE[first] + METHODS[method].format(bits=width, keep=keep))
        for last in behind:
            if (width, method, first, last) not in known:
                yield width, method, first, last, *start.row(BEHIND[last])


def rows_of(file: Path) -> list[Row]:
    """The rows of a table in Markdown, its head left out."""
    lines = file.read_text().splitlines() if file.is_file() else []
    cells = [tuple(line.strip("| ").split(" | ")) for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == len(COLUMNS) and row != COLUMNS and row[0] != "---"]


def added_to(file: Path, lines: Iterable[Row]) -> Iterator[Row]:
    """The rows as they come, each put at the file's end."""
    if not rows_of(file):
        with file.open("a") as out:
            out.write(_line(COLUMNS) + _line(["---"] * len(COLUMNS)))
    for row in lines:
        with file.open("a") as out:
            out.write(_line(row))
        yield row


def collected(lines: Iterable[Row], table: list[Row]) -> Iterator[Row]:
    """The rows as they come, each put behind those of ``table``."""
    for row in lines:
        table.append(row)
        yield row


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def side_by_side(table: Sequence[Row]) -> Iterator[str]:
    """In Markdown a line for each quantizer: perplexity, KL and bits a weight by what stands behind
    it."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for width, method, first, last, perplexity, gap, _, size, _ in table:
        if method != "source":
            loss = float(gap.partition(" ")[0])
            figures = perplexity.partition(" ")[0], f"{loss:.{3 if loss >= 1e-3 else 5}f}"
            cells.setdefault((width, method, first), {})[last] = " / ".join((*figures, size[:4]))
    columns = [last for last in BEHIND if any(last in row for row in cells.values())]
    yield _line(("bits", "method", "before", *columns))
    yield _line(["---"] * (3 + len(columns)))
    order = itertools.product("8432", BEFORE, METHODS)
    for key in ((width, method, first) for width, first, method in order):
        if key in cells:
            yield _line((*key, *(cells[key].get(last, "") for last in columns)))


def no_better(table: Sequence[Row]) -> list[str]:
    """A line for each setting in which methods give no lower perplexity than rounding to nearest,
    symmetric or not."""
    by_setting: dict[tuple[str, str, str], dict[str, float]] = {}
    for width, method, first, last, perplexity, *_ in table:
        if method != "source":
            value = float(perplexity.partition(" ")[0])
            by_setting.setdefault((width, first, last), {})[method] = value
    lines = []
    for (width, first, last), values in by_setting.items():
        least = min((values[name] for name in BASELINES if name in values), default=0.0)
        worse = [f"{name} {value:.4g}" for name, value in values.items()
                 if name not in BASELINES and value >= least > 0]  # fmt: skip
        if worse:
            setting = f"{width} bits, before: {first}, behind: {last}"
            lines.append(f"{setting}: to nearest {least:.4g}; no better: {', '.join(worse)}")
    return lines


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise BadInput(f"no {what} {name!r}; {near_misses(name, known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--before", default=",".join(BEFORE))
    parser.add_argument("--behind", default=",".join(BEHIND))
    parser.add_argument("--samples", type=int, default=40, help="windows of text to judge by")
    parser.add_argument("--rows", type=Path, metavar="FILE.md", help="go on with this table")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        asked = (
            chosen(options.bits, ("2", "3", "4", "8"), "width"),
            chosen(options.methods, tuple(METHODS), "method"),
            chosen(options.before, tuple(BEFORE), "pass"),
            chosen(options.behind, tuple(BEHIND), "pass"),
        )
        judge = Judge(options.model, options.samples)
        table = [] if options.rows is None else rows_of(options.rows)
        lines = rows(judge, *asked, known={row[:NAMED] for row in table})
        if options.rows is not None:
            lines = added_to(options.rows, lines)
        growing(options.model, COLUMNS, collected(lines, table))
        console.out(*side_by_side(table), sep="", end="")
        console.out(*no_better(table), sep="\n")

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
