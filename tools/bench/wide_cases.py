"""Which cases of the test suite show what others show already: those that ``tests/wide.txt`` names.

A case is wide where it takes long, where its test has another case that is not wide, and where
every statement of the package that it runs is run by other cases that are not: the longest first.
Wide cases are left out of ``pytest`` and of the gate; ``pytest -m wide`` runs them.

    pytest -m '' -n auto --dist loadfile --cov=graphwright --cov-context=test --cov-report= \\
        --durations=0 -vv > durations.txt
    python -m graphwright.tools.bench.wide_cases durations.txt .coverage > tests/wide.txt

That needs ``pytest-cov``, and some 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

LONG = 0.05
"""Seconds below which a case stays."""
OTHERS = 1
"""So many other cases that are not wide have to run each of its statements."""
Statements = Set[tuple[int, int]]
"""Numbers of files and lines."""


def wide(
    seconds: Mapping[str, float], runs: Mapping[str, Statements], long: float = LONG,
    others: int = OTHERS,
) -> list[str]:  # fmt: skip
    """The cases by name, in their order, that others stand for."""
    count = Counter(statement for statements in runs.values() for statement in statements)
    stay = Counter(map(_test, seconds))
    found = set[str]()
    for case in sorted(seconds, key=lambda name: (-seconds[name], name)):
        statements = runs.get(case, frozenset())
        if seconds[case] < long or stay[_test(case)] == 1 or not statements:
            continue
        if all(count[statement] > others for statement in statements):
            found.add(case)
            stay[_test(case)] -= 1
            count.subtract(statements)
    return sorted(found)


def _test(case: str) -> str:
    """The name of a case without its values."""
    return case.partition("[")[0]


def durations(lines: Iterable[str]) -> dict[str, float]:
    """Seconds of each case's own, of what pytest prints of the slowest: what is set up before it
    may be set up for others."""
    matches = (re.match(r"\s*([\d.]+)s call\s+(\S.*)", line) for line in lines)
    return {match[2].strip(): float(match[1]) for match in matches if match}


def statements_by_case(files: Iterable[Path]) -> dict[str, Statements]:
    """What each case runs, by the contexts of coverage's data."""
    from coverage import CoverageData

    found: dict[str, set[tuple[int, int]]] = {}
    numbers: dict[str, int] = {}
    for path in files:
        data = CoverageData(basename=str(path))
        data.read()
        for file in sorted(data.measured_files()):
            number = numbers.setdefault(file, len(numbers))
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in filter(None, contexts):
                    # Behind a bar stands the phase, setup or run.
                    found.setdefault(context.rpartition("|")[0] or context, set()).add(
                        (number, line)
                    )
    return {case: frozenset(statements) for case, statements in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("durations", type=Path, help="what pytest printed with --durations=0 -vv")
    parser.add_argument("data", type=Path, nargs="+", help="coverage's data, with contexts")
    parser.add_argument("--long", type=float, default=LONG, help="seconds below which a case stays")
    parser.add_argument("--others", type=int, default=OTHERS, help="cases that run each statement")
    options = parser.parse_args(arguments)
    seconds = durations(options.durations.read_text().splitlines())
    found = wide(seconds, statements_by_case(options.data), options.long, options.others)
    spared, whole = sum(map(seconds.__getitem__, found)), sum(seconds.values())
    print(f"{len(found)} of {len(seconds)} cases, {spared:.0f} of {whole:.0f} s", file=sys.stderr)
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
