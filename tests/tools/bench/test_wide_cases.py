"""Which cases others stand for, and that the list names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

from graphwright.tools.bench.wide_cases import durations, wide

TESTS = Path(__file__).resolve().parents[2]


def test_what_others_run_too_is_wide_the_longest_first() -> None:
    seconds = {"t.py::a[1]": 3.0, "t.py::a[2]": 2.0, "t.py::a[3]": 1.0, "u.py::b": 9.0,
               "u.py::c[1]": 5.0, "u.py::c[2]": 0.1}  # fmt: skip
    runs = {
        "t.py::a[1]": {(0, 1), (0, 2)}, "t.py::a[2]": {(0, 1), (0, 2)}, "t.py::a[3]": {(0, 1)},
        "u.py::b": {(0, 1), (0, 2)}, "u.py::c[1]": {(0, 1), (1, 7)}, "u.py::c[2]": {(0, 1)},
    }
    # What nobody else runs stays, a test's last case stays, and so does what two are needed for.
    assert wide(seconds, runs, long=0.5, others=1) == ["t.py::a[1]", "t.py::a[2]"]
    assert wide(seconds, runs, long=2.5, others=1) == ["t.py::a[1]"]
    assert wide(seconds, runs, long=0.5, others=2) == ["t.py::a[1]", "t.py::a[3]"]
    assert wide(seconds, runs, long=0.5, others=3) == ["t.py::a[3]"]
    assert wide(seconds, {}) == []


def test_seconds_are_those_of_the_call() -> None:
    lines = ["0.25s setup    t.py::a[x y]", " 1.50s call     t.py::a[x y]", "== slowest =="]
    assert durations(lines) == {"t.py::a[x y]": 1.5}


def test_each_wide_case_is_of_a_test_that_is_there() -> None:
    for case in (TESTS / "wide.txt").read_text().splitlines():
        file, _, name = case.partition("::")
        code = (TESTS.parent / file).read_text()
        assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", code, re.MULTILINE), case
