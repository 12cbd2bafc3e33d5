"""The text of recipes: it round-trips, and each mistake is told by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.passes import Recipe, pass_names
from graphwright.passes.recipe import recipe_names, recipe_summary
from graphwright.passes.weights.quantize import Quantize
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    "text",
    [
        "clean",
        "quantize{bits=4 group=32}",
        "quantize{group=32 bits=4}",
        "clean{optional=true},quantize{bits=8 group=64 symmetric=false}",
        "quantize{include=[encoder.* pooler*] exclude=[*.query] bits=4}",
        'quantize{include=["a b" "c,d"]}',
        "easyquant{bits=4 max_error=0.01}",
        "hqq{bits=4 include=a},quantize{bits=8 exclude=a}",
    ],
)
def test_text_round_trips(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)).passes == recipe.passes
    if "include=a}" not in text and "exclude=a" not in text:
        assert str(recipe) == text


globs = st.lists(st.text("ab.*[]{}=, \"\\", min_size=1, max_size=6), min_size=1, max_size=3)


@given(bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([0, 16, 32, 128]), include=globs)
def test_passes_made_in_python_print_and_parse(bits: int, group: int, include: list[str]) -> None:
    pass_ = Quantize(bits=bits, group=group, include=tuple(include))
    assert Recipe.parse(str(Recipe.of(pass_))).passes == (pass_,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a pass"),
        ("quantise{bits=4}", "did you mean quantize"),
        ("quantize{bit=4}", "did you mean bits"),
        ("quantize{bits=four}", "expected int"),
        ("quantize{bits=5}", "bits=5 must be one of 2, 3, 4, 8"),
        ("quantize{bits=4 group=48}", "group=48 must be one of 16, 32"),
        ("quantize{bits=4 bits=8}", "given twice"),
        ("quantize{bits=4", "'}' is missing"),
        ("quantize{bits}", "needs '='"),
        ("quantize{symmetric=perhaps}", "expected bool"),
        ("quantize{bits=4} hqq", "expected ','"),
        ("quantize,", "expected the name of a pass"),
        ("quantize{max_error=-1}", "must be above 0"),
        ("quantize{max_error=nan}", "max_error=nan is wrong: expected float"),
        ("quantize{scales=float8}", "one of float32, float16"),
        ("quantize{bits=4},hqq{bits=4}", "would both store the same sites"),
        ('quantize{include="a}', "a quote is not closed"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message.replace("(", r"\(")):
        Recipe.parse(text)


def test_built_in_recipes_load_and_say_what_they_are_for() -> None:
    assert {"w8", "w4"} <= set(recipe_names())
    for name in recipe_names():
        assert Recipe.parse(str(Recipe.load(name))).passes == Recipe.load(name).passes
        assert recipe_summary(name).endswith(".")


def test_a_toml_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[passes]]\nname = "quantize"\nbits = 8\ninclude = ["a", "b*"]\n')
    assert str(Recipe.load(str(path))) == "quantize{bits=8 include=[a b*]}"
    with pytest.raises(BadInput, match="did you mean w4"):
        Recipe.load("w44")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = 3", r"holds \[\[passes\]\] tables"),
        ("[[passes", "not a TOML file"),
        ("a=" + "[" * 100_000, "not a TOML file"),
        ("a=" + "9" * 5000, "not a TOML file"),
        ("passes = [3]", "needs a name, a text"),
        ("[[passes]]\nname = 5", "needs a name, a text"),
        ('[[passes]]\nname = ["quantize"]', "needs a name, a text"),
        ('[[passes]]\nname = "quantize"\ninclude = {a = 1}', "include={'a': 1} is wrong"),
        ('[[passes]]\nname = "quantize"\ninclude = [["a"]]', r"include=\[\['a'\]\] is wrong"),
        ('[[passes]]\nname = "quantize"\nbits = 1979-05-27', "bits=1979-05-27 is wrong"),
        ('[[passes]]\nname = "quantize"\nbits = [4]', r"quantize: bits=\[4\] is wrong: expected"),
        ('[[passes]]\nname = "quantize"\nmax_error = inf', "max_error=inf is wrong"),
        ('[[passes]]\nname = "quantise"', "did you mean quantize"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=rf"mine\.toml: .*{message}"):
        Recipe.load(str(path))


def test_a_yaml_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "summary: Mine.\npasses:\n  - name: quantize\n    bits: 8\n    symmetric: no\n"
        "    ignore: [lm_head, 'b*']\n  - {name: fold-constants}\n"
    )
    recipe = Recipe.load(str(path))
    assert str(recipe) == "quantize{bits=8 symmetric=false exclude=[lm_head b*]},fold-constants"
    assert recipe.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: 3", "holds a list of passes, each with a name"),
        ("- name: quantize", "holds a list of passes"),
        ("passes: [", "not a YAML file: while parsing"),
        ("passes:\n- name: !!python/object:os.system {}", "not a YAML file: could not determine"),
        ("a: &a [x, x]\nb: [*a, *a]\npasses: *a", "not a YAML file: aliases are not read"),
        ("passes:\n- name: quantize\n  4: 5", "quantize has no option '4'"),
        ("passes:\n- name: quantize\n  bits: 2026-01-01", "bits=2026-01-01 is wrong"),
        ("passes:\n- bits: 4", "needs a name, a text"),
        ("a: " + "[" * 100_000, "not a YAML file: lists and tables in each other, more than 16"),
        ("a: \x00", "not a YAML file"),
    ],
)
def test_yaml_that_holds_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(BadInput, match=rf"mine\.yml: .*{message}"):
        Recipe.load(str(path))


def test_names_that_other_tools_use() -> None:
    expected = Recipe.parse("quantize{bits=4 group=64 exclude=[lm_head]}").passes
    for word in ("group_size", "block_size"):
        assert Recipe.parse(f"quantize{{bits=4 {word}=64 ignore=lm_head}}").passes == expected
    with pytest.raises(BadInput, match="the option group is given twice"):
        Recipe.parse("quantize{group=32 group_size=32}")
    with pytest.raises(BadInput, match="clean has no option 'group_size'"):
        Recipe.parse("clean{group_size=32}")
    four, eight = Recipe.load("W4A16"), Recipe.load("w8a16")
    assert four.name == "W4A16" and str(eight).endswith("quantize{bits=8 group=0}")
    assert str(Recipe.load("W8A8")) == "clean{optional=true},w8a8"
    assert Recipe.parse(str(four)).passes == four.passes
    with pytest.raises(BadInput, match="did you mean W8A8, W4A16"):
        Recipe.load("W4A8")


def test_every_pass_is_listed() -> None:
    assert {"clean", "fold-constants", "quantize", "easyquant", "hqq"} <= set(pass_names())
