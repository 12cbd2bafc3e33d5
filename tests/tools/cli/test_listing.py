"""``optimize-model passes NAME``: every option is told in one line of a terminal."""

from __future__ import annotations

import dataclasses
import io

import pytest
from graphwright.passes.registry import pass_class, pass_names
from graphwright.tools.cli.listing import print_pass
from rich.console import Console


@pytest.mark.parametrize("name", pass_names())
def test_each_option_is_a_line_that_says_what_it_is_for(name: str) -> None:
    out = io.StringIO()
    print_pass(Console(file=out, width=80), name)
    _, _, table = out.getvalue().partition("\noption ")
    _, *lines = table.splitlines()
    options = [field.name for field in dataclasses.fields(pass_class(name))]
    assert [line.partition("=")[0] for line in lines] == options
    assert all(len(line.split()) > 1 for line in lines)


def test_choices_are_told_with_the_default_first() -> None:
    out = io.StringIO()
    print_pass(Console(file=out, width=80), "easyquant")
    for option in ("bits=4 ", "solver=als|adam ", "per_row=false ", "include=[globs] "):
        assert f"\n{option}" in out.getvalue()
