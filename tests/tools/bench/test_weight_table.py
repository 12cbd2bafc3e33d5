"""The bench of few bits: what it computes once is what a run of its own computes; its tables."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import torch
from graphwright.ir.load.tracing.trace import trace
from graphwright.tools.bench.weight_judge import Kept, Once
from graphwright.tools.bench.weight_table import COLUMNS, added_to, no_better, rows_of, side_by_side

ROWS = [
    ("-", "source", "-", "-", "34.68 (31.11 to 38.52)", "0 (0 to 0)", "1", "-", "-"),
    ("2", "gptq", "none", "eora-16", "39.87 (35.8 to 44.3)", "0.1737 (0.16 to 0.19)", "0.9",
     "4.682", "25"),
    ("2", "gptq", "none", "none", "42.4 (38.03 to 47.22)", "0.2435 (0.23 to 0.26)", "0.5",
     "2.500", "14"),
    ("2", "quantize", "none", "none", "41.9 (37 to 46)", "0.8055 (0.77 to 0.85)", "0.1", "2.500",
     "1"),
    ("3", "hqq", "rotate", "none", "38.44 (34.4 to 42.9)", "0.1396 (0.13 to 0.16)", "1", "4.000",
     "2"),
]  # fmt: skip


def test_a_path_behind_what_is_kept_is_that_of_a_whole_run() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))
    inputs = {"input": torch.randn(40, 32)}
    graph = trace(model.eval(), (inputs["input"],))
    base, kept = "gptq{bits=2 group=16}", Kept(1)
    gw.optimize(graph, base, calibration=[inputs], samples=[inputs], checkpoints=kept)
    for rank in (1, 4):
        kept.forget_what_followed()
        recipe = f"{base},eora{{rank={rank}}}"
        both = [
            gw.optimize(graph, recipe, calibration=[inputs], samples=[inputs], checkpoints=store)
            for store in (None, kept)
        ]
        alone, behind = ({n: w.read() for n, w in run.graph.weights().items()} for run in both)
        assert alone.keys() == behind.keys()
        assert all(torch.equal(alone[name], behind[name]) for name in alone)
        assert {w.shape[0] for n, w in alone.items() if w.dim() == 2 and rank in w.shape} >= {rank}


def test_an_input_runs_once() -> None:
    calls: list[torch.Tensor] = []

    class Run:
        input_names, output_names = ("x",), ("y",)

        def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            calls.append(inputs["x"])
            return {"y": inputs["x"] + 1}

    once = Once(Run())  # type: ignore[arg-type]
    rows = torch.arange(4)
    results = [once(x=x)["y"].tolist() for x in (rows, rows.clone(), rows.view(2, 2), rows + 1)]
    assert results == [[1, 2, 3, 4], [1, 2, 3, 4], [[1, 2], [3, 4]], [2, 3, 4, 5]]
    assert len(calls) == 3


def test_rows_are_kept_in_a_file_and_shown_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "rows.md"
    assert rows_of(file) == []
    assert list(added_to(file, ROWS[:2])) == ROWS[:2]
    assert list(added_to(file, ROWS[2:])) == ROWS[2:]
    assert rows_of(file) == ROWS and file.read_text().count(" | ".join(COLUMNS)) == 1
    assert "".join(side_by_side(ROWS)).splitlines() == [
        "| bits | method | before | none | eora-16 |",
        "| --- | --- | --- | --- | --- |",
        "| 3 | hqq | rotate | 38.44 / 0.140 / 4.00 |  |",
        "| 2 | quantize | none | 41.9 / 0.805 / 2.50 |  |",
        "| 2 | gptq | none | 42.4 / 0.243 / 2.50 | 39.87 / 0.174 / 4.68 |",
    ]
    assert no_better(ROWS) == [
        "2 bits, before: none, behind: none: to nearest 41.9; no better: gptq 42.4"
    ]
