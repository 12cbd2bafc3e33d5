"""Which kernels check an artifact: a user's session's, or others that it tells of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import graphwright.backends.artifacts.judging as judging
import pytest
from graphwright.tools.evaluate.task import silent
from graphwright.tools.report.summary import runs
from graphwright.tools.run import pipeline


@pytest.mark.parametrize(
    ("largest", "rounded", "recipe", "prepacked"),
    [
        (1 << 29, 0, "quantize{bits=4 group=32 accuracy_level=0}", True),
        (0, 0, "quantize{bits=4 group=32 accuracy_level=0}", False),
        (0, 1 << 29, "quantize{bits=4 group=32}", True),
    ],
)
def test_a_large_artifact_is_checked_as_it_will_run_or_the_manifest_says_not(
    largest: int, rounded: int, recipe: str, prepacked: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lean: dict[bool, bool] = {}
    whole = judging.compile

    def noting(*args: Any, **options: Any) -> Any:
        lean.setdefault(options["optimize"], options["lean"])
        return whole(*args, **options)

    monkeypatch.setattr(judging, "compile", noting)
    monkeypatch.setattr(judging, "REPACKED_BYTES", largest)
    monkeypatch.setattr(judging, "ROUNDED_BYTES", rounded)
    request = pipeline.Request("zoo:tiny-vit", gw.Recipe.parse(recipe), tmp_path / "out")
    checks = pipeline.run(request, silent).verification
    assert lean == {True: not prepacked, False: not rounded}
    assert checks.prepacked is prepacked
    assert checks.runtime.optimized is not None
    # Rounding alone makes two sound runs differ by as much.
    assert (checks.runtime.optimized.rel_l2 > 1e-4) is (rounded > 0 and prepacked and largest == 0)
    assert checks.outputs[0].rel_l2 > 1e-3
    labels = [label for label, _ in runs(checks)]
    assert ("ONNX Runtime, optimisation on, weights not repacked" in labels) is not prepacked
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("weights not repacked" in page) is not prepacked
