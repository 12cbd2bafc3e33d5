"""What ``replay`` refuses before it repeats anything."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.tools.evaluate.task import silent
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
