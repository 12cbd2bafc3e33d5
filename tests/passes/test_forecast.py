"""What a run is forecast to take in the runtime, by the numbers that it stores in codes."""

from __future__ import annotations

import graphwright as gw
import pytest
from graphwright.backends.runtimes.original import ROUNDED_BYTES
from graphwright.ir.core.view import View
from graphwright.passes import forecast

from tests.models import qwen2, traced


@pytest.fixture(scope="module")
def graph() -> View:
    return traced(qwen2())


def test_checks_widen_codes_in_each_run_and_longer_where_nothing_is_repacked(
    graph: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forecast.REPACKED_UP_TO == ROUNDED_BYTES
    recipe = "quantize{bits=4 group=32}"
    planned = gw.plan(graph, recipe)
    numbers = sum(site.shape[0] * site.shape[1] for site in planned.passes[0][1].sites)
    monkeypatch.setattr(forecast, "REPACKED_UP_TO", 0)
    slower = gw.plan(graph, recipe).seconds - planned.seconds
    assert slower == pytest.approx(2 * numbers * (7e-9 - 2.5e-9), rel=1e-3)
    whole = gw.plan(graph, "drop-blocks{count=1}").seconds
    monkeypatch.setattr(forecast, "REPACKED_UP_TO", ROUNDED_BYTES)
    assert gw.plan(graph, "drop-blocks{count=1}").seconds == whole  # which stores no codes
