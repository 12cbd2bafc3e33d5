"""What ships goes together: the zoo's models, the built-in recipes and the quantizers, from a
module and from an ONNX file, with a cache and without. A run ends well, or it says why it cannot.

``tools.bench.shipped`` runs all of them; here each recipe and each model once, and both kinds with
a cache and without.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.tools.bench import shipped
from graphwright.tools.bench.shipped import EVERY, MODELS, RECIPES, Case, Sources

pytestmark = pytest.mark.slow
TRIED = {
    "tiny-vit/fx": (
        "any-size", "w4-eora", "easyquant{bits=4}", "bitstack{blocks=3}", "hqq{bits=2 group=16}",
        "sparsegpt,dsnot", "vlm-small",
    ),
    "tiny-vit/onnx": (
        "magnitude{pattern=2:4}", "quantize{bits=4 accuracy_level=4}", "quantize{bits=8 group=64}",
        "quantize{bits=2 group=32}", "quantize{bits=2 group=32},eora{rank=8}",
        "quantize{bits=3 group=32},svd-compensate{rank=8}",
    ),
    "tiny-llama/fx+cache": ("w4", "vlm-fast"),
    "tiny-llama/onnx+cache": ("quantize{bits=3 group=64 symmetric=false}",),
    "tiny-llava/fx": ("vlm-fast",),
    "tiny-llava-next/fx": ("quantize{bits=4 group=0}",),
    "minilm/onnx": ("w8",),
}  # fmt: skip
CHOSEN = [case for case in EVERY if case.recipe in TRIED.get(str(case.source), ())]
"""The slow recipes on the smallest model; what once ended in an error; a recipe for images on a
source without a tower and on one without a text."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_what_ships_goes_together(case: Case, sources: Sources, tmp_path: Path) -> None:
    if case.refusal:
        with pytest.raises(BadInput, match=case.refusal):
            shipped.run(case, sources, tmp_path / "out")
        return
    done = shipped.run(case, sources, tmp_path / "out")
    assert any(step.sites for step in done.passes)
    assert {output.rel_l2 is not None for output in done.verification.outputs} == {True}


def test_the_cases_cover_what_ships() -> None:
    sources = {case.source for case in CHOSEN}
    assert {case.recipe for case in CHOSEN} == set(RECIPES)
    assert {s.model for s in sources} == set(MODELS)
    assert {(s.kind, s.cache) for s in sources} == {
        (k, c) for k in ("fx", "onnx") for c in (True, False)
    }


def test_an_error_is_no_refusal(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command would count."""
    case = next(c for c in CHOSEN if str(c) == "tiny-vit/fx/vlm-small")
    assert shipped.outcome(case, sources)[0] == "refused"
    monkeypatch.setattr(shipped, "NO_TEXT", "something else")
    assert shipped.outcome(case, sources)[0] == "failed"
