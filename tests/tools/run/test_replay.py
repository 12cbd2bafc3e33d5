"""What ``replay`` refuses before it repeats anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.tools.evaluate.task import silent
from graphwright.tools.report import manifest
from graphwright.tools.run.replay import replay


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a graph that was traced in memory."""
    torch.manual_seed(0)
    graph = gw.trace(torch.nn.Linear(32, 5), (torch.ones(3, 32),))
    result = gw.optimize(graph, "quantize{bits=8}")
    return gw.export(result.graph, tmp_path_factory.mktemp("made") / "out", report=result.report)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_artifact_is_not_replayed_onto_itself(artifact: Path) -> None:
    before = contents(artifact)
    with pytest.raises(BadInput, match="is the artifact itself: give another --out"):
        replay(artifact, artifact.parent / "." / "out", silent)
    assert contents(artifact) == before


def test_a_graph_of_memory_is_gone(artifact: Path) -> None:
    with pytest.raises(BadInput, match=r"made from a memory graph .* run gw.optimize on it"):
        replay(artifact, None, silent)


def test_a_source_is_found_from_any_folder(
    language_model: Path, publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "other").mkdir()
    shutil.copytree(language_model, tmp_path / "work" / "model")
    (tmp_path / "work" / "text.txt").write_text("Any text that is long enough to learn from. " * 9)
    monkeypatch.chdir(tmp_path / "work")
    data = ("--calib", "text.txt", "--calib-windows", "joined")
    artifact = publish("model", "magnitude,eora{rank=2}", *data)
    monkeypatch.chdir(tmp_path / "other")
    assert replay(artifact, None, silent)["identical"]
    moved = tmp_path / "work" / "moved"
    (tmp_path / "work" / "model").rename(moved)
    with pytest.raises(Missing, match=r"its source, model, is not there.* --source MODEL"):
        replay(artifact, None, silent)
    assert replay(artifact, None, silent, source=str(moved))["identical"]


def test_runs_behind_each_other_are_one_recipe(tmp_path: Path, language_model: Path) -> None:
    """The manifest says all that was done to the source, and from what errors are measured; replay
    makes the same of it, though no hash was taken of the source. ``accuracy_level``, which 4 bits
    leave open, stays what it is without a target: the CPU's own would be 4."""
    first = gw.optimize(gw.load(language_model, cache=True), "path{blocks=0}")
    second = gw.optimize(first.graph, "quantize{bits=4}")
    assert first.report.recipe == "path{blocks=0}"
    known = manifest.load(gw.export(second.graph, tmp_path / "a", report=second.report))
    assert known.recipe == "path{blocks=0},quantize{bits=4}"
    assert known.source.notes == [
        "path{blocks=0} came before this run: errors are against the graph that it left"
    ]
    assert replay(tmp_path / "a", None, silent)["recipe"] == known.recipe
