"""``python -m graphwright.tools.bench.record``: is what the code makes still what was recorded?

Runs recipes on the zoo's models, from FX and from ONNX, with a cache and without, and compares
sites, bytes, hashes of stored weights, refusals and outputs with the record in ``tests/record``. It
is there to hold a change of the code's form against. A change of results changes the record
(``--update``), in a commit that says why. Runs on one thread: sums keep their order.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .record_cases import Case, Subject, all_cases
from .record_facts import Row, differences, measure, read_rows, write_rows

FOLDER = Path(__file__).parents[2] / "tests" / "record"
SHOWN = 3
"""Differences of a row that are told; the first sites say it."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch computes on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded(model: str) -> dict[str, Row]:
    """The rows of a model, by ``Case.row``; none where nothing is recorded."""
    file = FOLDER / f"{model}.json"
    return read_rows(file.read_text()) if file.is_file() else {}


def compare(case: Case, before: Row | None, now: Row) -> list[str]:
    """What differs from the record, a line each."""
    return ["not in the record"] if before is None else differences(before, now)


def replay(cases: Sequence[Case], *, update: bool, console: Console) -> int:
    """Run cases, a line each; the number of rows that differ from the record.

    With ``update`` those rows are written, model by model, and rows of no case go.
    """
    counts: Counter[str] = Counter()
    for model, group in groupby(cases, key=lambda case: case.model):
        subject, rows = Subject(model, FOLDER), recorded(model)
        for case in group:
            if update:
                subject.keep_graph(case.start)
            started = time.process_time()
            now = measure(subject, case)
            lines = compare(case, rows.get(case.row), now)
            counts["different" if lines else "equal"] += 1
            _tell(console, case, time.process_time() - started, lines)
            if lines:
                rows[case.row] = now
        if update:
            order = [c.row for c in all_cases() if c.model == model and c.row in rows]
            (FOLDER / f"{model}.json").write_text(write_rows({name: rows[name] for name in order}))
    console.print(f"{counts['equal']} rows equal, {counts['different']} different")
    return counts["different"]


def _tell(console: Console, case: Case, seconds: float, lines: Sequence[str]) -> None:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    console.print(
        f"{'different' if lines else 'equal':<9} {seconds:5.1f} s  {case}",
        *(f"\n            {line}" for line in [*lines[:SHOWN], *more]),
        sep="", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def main(
    update: Annotated[bool, typer.Option(help="Write what differs into the record.")] = False,
    only: Annotated[str, typer.Option(help="Glob on MODEL/START/RECIPE.")] = "*",
    threads_: Annotated[
        int, typer.Option("--threads", help="To see what depends on the order of sums.")
    ] = 1,
) -> None:
    """Compare what the code makes with the record; exit code 1 where a row differs."""
    cases = [case for case in all_cases() if fnmatchcase(str(case), only)]
    if not cases:
        raise typer.BadParameter(f"--only {only} matches no case")
    with threads(threads_):
        different = replay(cases, update=update, console=Console())
    raise typer.Exit(int(different > 0 and not update))


if __name__ == "__main__":
    typer.run(main)
