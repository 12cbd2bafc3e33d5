"""What the report draws of a search."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from graphwright.tools.report.manifest import FrontEntry, Manifest, SearchEntry, SiteEntry
from graphwright.tools.report.search_plots import allocation, front
from graphwright.tools.report.summary import merged_sites, with_weights


def searched(*losses: float | None) -> SearchEntry:
    points = [
        FrontEntry(
            recipe="clean", bytes=(i + 1) * 10**6, loss=loss, chosen=i == 1, costs={"ms": 9.0 - i}
        )
        for i, loss in enumerate(losses)
    ]
    return SearchEntry(
        budget="bytes=50%", limits={"bytes": 5e6}, source={"bytes": 1e7, "ms": 16.0},
        using=["bits"], loss_is="", judged=1, held={}, front=points, prices=[], factors={},
    )  # fmt: skip


def test_smaller_losses_are_lower_and_larger_sizes_further_right() -> None:
    search = searched(0.1, 0.01, 0.001, 0.0, None)
    search.front[1].interval = [-0.001, 0.02]
    drawn = front(search)
    assert drawn is not None
    first, second, third = drawn["points"]
    assert first["x"] < second["x"] < third["x"] and first["y"] < second["y"] < third["y"]
    assert first["ends"] is None and second["chosen"] and not third["chosen"]
    low, high = second["ends"]
    assert low == drawn["bottom"] > second["y"] > high
    assert second["title"] == "2 MB, 20.0% of the source: loss 1.000%, measured"
    assert drawn["axis"] == "weights, MB" and front(searched(0.1, None)) is None
    search.axis = "ms"
    drawn = front(search)
    assert drawn is not None and drawn["label"] == "Loss against one run"
    first, second, third = drawn["points"]
    assert first["x"] > second["x"] > third["x"]
    assert second["title"] == "8 ms, 50.0% of the source: loss 1.000%, measured"


def test_a_row_is_a_role_and_a_column_a_block(make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest("quantize", layers=3)
    gone = SiteEntry(name="block 1.attn", kind="attn", shape=[0], bytes_before=9, bytes_after=0)
    manifest.passes[0].sites.append(gone)
    drawn = allocation(with_weights(merged_sites(manifest)), manifest.passes)
    assert drawn is not None
    assert len(drawn["roles"]) == 6 and [block["label"] for block in drawn["blocks"]] == [0, 1, 2]
    assert len(drawn["cells"]) == 18 and len({(c["x"], c["y"]) for c in drawn["cells"]}) == 18
    assert {cell["text"] for cell in drawn["cells"]} == {"4.5"}
    assert drawn["outside"] == ["pooler.dense: 4.5"] and drawn["left_out"] == ["block 1.attn"]
    assert allocation([], manifest.passes) is None


@pytest.mark.parametrize("layers", [12, 80])
def test_a_deep_model_still_fits(make_manifest: Callable[..., Manifest], layers: int) -> None:
    drawn = allocation(
        with_weights(merged_sites(make_manifest("quantize", layers=layers))), []
    )
    assert drawn is not None
    assert max(cell["x"] for cell in drawn["cells"]) + drawn["cell"] <= drawn["width"]
    gaps = [b["x"] - a["x"] for a, b in zip(drawn["blocks"], drawn["blocks"][1:], strict=False)]
    assert min(gaps) >= 14
