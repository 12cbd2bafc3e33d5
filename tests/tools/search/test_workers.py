"""Workers of a search: the same result for any number of them, and for those of Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.view import View
from graphwright.tools.search.budget import Budget
from graphwright.tools.search.data import parts
from graphwright.tools.search.measure import measured
from graphwright.tools.search.points import Found
from graphwright.tools.search.rounds import Rounds
from graphwright.tools.search.search import search
from graphwright.tools.search.workers import Forked

from .conftest import Batches, silent


def test_any_number_of_workers_finds_the_same_and_one_that_dies_loses_nothing(
    views: dict[str, View], batches: Batches, outcome: Found, tmp_path: Path
) -> None:
    view, known = views["fx"], parts(views["fx"], batches)

    def dying(recipe: gw.Recipe) -> Any:
        with contextlib.suppress(FileExistsError):
            (tmp_path / "died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return measured(view, outcome.judge, known.fit, recipe)

    tables = []
    for count in (1, 2):
        rounds = Rounds(
            view, view, Budget.parse("bytes=40%"), known, outcome.menu, outcome.judge, 1, silent,
            workers=Forked(count, dying),
        )  # fmt: skip
        done = rounds.found()
        tables.append([(str(p.recipe), p.costs, p.measured) for p in rounds.measured.values()])
        assert (tmp_path / "died").exists() and len(tables[-1]) >= 2
        assert str(done.recipe) == str(outcome.recipe)
    assert tables[0] == tables[1]
    losses = {recipe: costs["loss"] for recipe, costs, _ in tables[0]}
    for point in outcome.front:  # measured in this process, on as many threads as there are
        if point.measured:
            assert losses[str(point.recipe)] == pytest.approx(point.costs["loss"], rel=1e-3)


def test_what_workers_raise_is_raised_here() -> None:
    def refuse() -> None:
        raise gw.BadInput("no such thing")

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def call(task: Callable[[], Any]) -> Any:
        return task()

    counts: list[int] = []
    with pytest.raises(gw.BadInput, match="no such thing"):
        Forked(2, call).run([refuse, refuse], silent, silent)
    with pytest.raises(gw.BadInput, match=r"ended 2 times at the same recipe \(SIGKILL\)"):
        Forked(2, call).run([lambda: 7, end], silent, lambda place, result: counts.append(result))
    assert counts == [7]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        Forked(1, call).run([lambda: 1 // 0], silent, silent)
    with pytest.raises(gw.BadInput, match="a search takes 1 or more"):
        Forked(-1, call)


def test_ray_that_is_not_there(
    views: dict[str, View], batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, view = views["fx"].copy(), views["fx"]
    named.source = replace(view.source, kind="zoo", name="zoo:tiny-llama")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(gw.Missing, match=r"pip install 'graphwright\[ray\]', or give --workers N"):
        gw.search(named, budget="bytes=40%", calibration=batches, workers="ray")

    def refuse(**_: Any) -> None:
        raise ConnectionError("nobody listens")

    stub = SimpleNamespace(is_initialized=lambda: False, init=refuse)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(gw.Missing, match=rf"at 127\.0\.0\.1:{port} .*: nobody listens"):
            gw.search(named, budget="bytes=40%", calibration=batches, workers="ray")
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")  # where Ray would ask for minutes
    with pytest.raises(gw.Missing, match=rf"no Ray cluster at ray://127\.0\.0\.1:{port} .*refused"):
        gw.search(named, budget="bytes=40%", calibration=batches, workers="ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(gw.Missing, match=r"no Ray cluster at auto .*: nobody listens"):
        gw.search(named, budget="bytes=40%", calibration=batches, workers="ray")
    with pytest.raises(gw.BadInput, match="is a graph of memory: give workers=N"):
        gw.search(view, budget="bytes=40%", calibration=batches, workers="ray")
    with pytest.raises(gw.BadInput, match="workers='rey': a number of processes, or ray"):
        gw.search(view, budget="bytes=40%", calibration=batches, workers="rey")


def test_workers_of_ray_find_the_same(language_model: Path) -> None:
    ray: Any = pytest.importorskip("ray")
    ids = torch.arange(96).view(4, 24) + 5
    rows = [{"input_ids": ids + 97 * i, "attention_mask": torch.ones_like(ids)} for i in range(4)]
    graph = gw.load(language_model)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        tables = []
        for workers in ("ray", 2):
            done = search(
                graph, budget="bytes=50%", calibration=rows, rounds=1, using=("bits",),
                workers=workers,
            )  # fmt: skip
            tables.append([(str(p.recipe), p.costs, p.measured) for p in done.front])
    finally:
        ray.shutdown()
    assert tables[0] == tables[1] and any(measure for *_, measure in tables[0])
