"""What a person finds who types ``gw.`` and presses the key for completion."""

from __future__ import annotations

import graphwright as gw
import pytest
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
