"""What a person finds who types ``gw.`` and presses the key for completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.passes.registry import class_name, pass_names


def test_completion_shows_functions_types_errors_and_passes() -> None:
    assert {"load", "optimize", "View", "Recipe", "BadInput", "passes", "__version__"} <= {*dir(gw)}
    assert {class_name(name) for name in pass_names()} | {"Pass", "Site"} <= {*dir(gw.passes)}
    for module in (gw, gw.passes):
        assert [name for name in dir(module) if not hasattr(module, name)] == []


def test_errors_are_caught_by_the_names_of_the_package() -> None:
    with pytest.raises(gw.BadInput, match="did you mean quantize"):
        gw.Recipe.parse("quantise")
    assert issubclass(gw.Missing, gw.GraphwrightError)


def test_a_model_is_optimized_and_planned_by_its_name() -> None:
    done = gw.optimize("zoo:tiny-vit", "quantize{bits=8 group=16 include=[*.0.*]}")
    foreseen = gw.plan("zoo:tiny-vit", "quantize{bits=8 group=16 include=[*.0.*]}")
    sites = [site.name for site in done.report.passes[0].result.sites]
    assert sites and [site.name for site in foreseen.passes[0][1].sites] == sites
    with pytest.raises(gw.BadInput, match="a model is zoo:NAME"):
        gw.optimize("no-such-model", "clean")


@pytest.fixture(scope="module")
def small() -> Any:
    module = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()
    return gw.trace(module, torch.ones(2, 32)), module


def test_a_recipe_is_a_list_of_passes_and_texts(small: Any) -> None:
    graph, _ = small
    passes = ["clean{optional=true}", gw.passes.Quantize(bits=8)]
    assert gw.optimize(graph, passes).report.recipe == "clean{optional=true},quantize{bits=8}"


def test_arrays_run_as_tensors_do(small: Any) -> None:
    run, x = gw.compile(small[0]), torch.randn(3, 32)
    (name,) = small[0].input_names()
    assert torch.equal(run(**{name: x.numpy()})["output"], run(x)["output"])
    with pytest.raises(gw.BadInput, match="is a list: give a tensor"):
        run([[0.0] * 32])


def test_what_is_given_in_the_place_of_another_thing(small: Any, tmp_path: Path) -> None:
    """Says what was given, and what makes of it what is taken; no error of Python's own."""
    graph, module = small
    result = gw.optimize(graph, "quantize{bits=8}")
    data = [{"x": torch.ones(2, 32)}]
    cases: list[tuple[Any, str]] = [
        (lambda: gw.load(module), r"this is a Sequential: .* gw.trace\(module, inputs\) makes"),
        (lambda: gw.load("zoo:minilm", dtype="float12"), "dtype is 'float12', and must be one of"),
        (lambda: gw.optimize(module, "clean"), "this is a Sequential"),
        (lambda: gw.optimize(graph, None), "a recipe holds passes or their text, and this is None"),
        (lambda: gw.optimize(graph, gw.passes.Quantize), r"a class: Quantize\(\) is a pass"),
        (lambda: gw.optimize(graph, "gptq", calibration="gone.txt"), "gone.txt: no such file"),
        (lambda: gw.compile(module), r"this is a Sequential: .* gw.trace\(module, inputs\) make"),
        (lambda: gw.export(result, tmp_path / "a"), "give its .graph .and report=its .report"),
        (lambda: gw.export(graph, tmp_path / "a", report="x"), "report is a str, and must be that"),
        (lambda: gw.export(graph, None), "out is a NoneType, and must be the name of a folder"),
        (lambda: gw.search(graph, budget={"bytes": 1}, calibration=data), "budget is a dict, and"),
        (lambda: gw.search(graph, budget="bytes=9%", using="bit", calibration=data), "using bit"),
    ]
    for made, message in cases:
        with pytest.raises(gw.GraphwrightError, match=message):
            made()
