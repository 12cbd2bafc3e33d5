"""``--calib``: which of the data are used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.zoo.text import english_sentences
from graphwright.ir.run.sweep import sweep
from graphwright.tools.cli.main import main
from graphwright.tools.data.calibration import read
from graphwright.tools.data.selecting import nearest
from graphwright.tools.report import manifest
from graphwright.tools.run.most_moved import PROBE, most_moved

from .conftest import FACTORY, WORDS, jsonl


def test_samples_that_move_most_are_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more rows than are used, those whose outputs few bits move most, each measured by itself;
    the manifest says how they were chosen, and a replay chooses them again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("graphwright_moved_factory.py").write_text(FACTORY)
    model = "graphwright_moved_factory:make"
    x = np.random.default_rng(0).standard_normal((30, 32)).astype(np.float32)
    np.savez("a.npz", x=x)

    def command(*arguments: str) -> str:
        with pytest.raises(SystemExit) as leave:
            main(list(arguments))
        assert not leave.value.code
        return " ".join("".join(capsys.readouterr()).split())

    said = command(
        model, "-p", "gptq{group=16}", "-o", "out", "--calib", "a.npz", "--calib-samples", "5",
        "--calib-select", "most-moved",
    )  # fmt: skip
    assert "calibrated on a.npz: 5 samples, chosen by most-moved" in said
    entry = manifest.load("out").calibration
    assert entry is not None and entry.select == "most-moved"
    assert "byte-identical" in command("replay", "out", "--trust-source")

    view = load(model, cache=False)
    gw: Any = importlib.import_module("graphwright")
    rounded = gw.optimize(view, PROBE, samples=[{"x": torch.from_numpy(x)}]).graph
    moves = []
    for row in torch.from_numpy(x).split(1):
        before, after = (next(iter(sweep(g, {"x": row}).values())) for g in (view, rounded))
        moves.append(float((after - before).norm() / before.norm()))
    most = sorted(sorted(range(30), key=moves.__getitem__)[-5:])
    chosen = torch.cat([b["x"] for b in most_moved(view, read("a.npz", view).batches, 5)])
    assert torch.equal(chosen, torch.from_numpy(x)[most])


def test_windows_near_a_task_by_compression(tmp_path: Path, llama: View) -> None:
    """Lines of a log among prose: a task of other such lines picks them, without a model."""
    prose = english_sentences(24)
    log = [f"2026-11-{i:02d} 10:{i}7 GET /{i * 37}.html 200 bytes={i * 911}" for i in range(9)]
    texts = [*prose[:20], *log[:5], *prose[20:]]
    data = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    (tmp_path / "task.txt").write_text(" ".join(log[5:]))
    chosen = read(data, llama, samples=5, length=64, select=f"zip-fit={tmp_path / 'task.txt'}")
    alone = read(jsonl(tmp_path / "b.jsonl", *({"text": t} for t in log[:5])), llama, length=64)
    rows = {tuple(r.tolist()) for b in chosen.batches for r in b["input_ids"]}
    first = {tuple(r.tolist()) for b in alone.batches for r in b["input_ids"]}
    assert {r[:48] for r in rows} == {r[:48] for r in first}
    assert chosen.entry().select.startswith("zip-fit=")
    assert nearest(prose, 24, prose[3:4])[0] == 3, "nothing is nearer than the text itself"


@pytest.mark.parametrize(
    ("select", "error", "reason"),
    [
        ("zipfit=a.txt", BadInput, "there is no such way; --calib-select takes zip-fit=FILE"),
        ("zip-fit=gone.txt", Missing, r"gone\.txt: no such file"),
        ("zip-fit=a.csv", BadInput, r"a\.csv: not a kind of text"),
    ],
)
def test_ways_to_choose_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: View, select: str, error: Any,
    reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.csv"):
        Path(name).write_text(WORDS)
    with pytest.raises(error, match=reason):
        read("a.txt", llama, select=select)


def test_images_are_not_chosen_by_text(tmp_path: Path, vit: View) -> None:
    (tmp_path / "task.txt").write_text(WORDS)
    with pytest.raises(BadInput, match="is for text, and zoo:tiny-vit is none"):
        read("zoo:tiny-vit", vit, samples=2, select=f"zip-fit={tmp_path / 'task.txt'}")
