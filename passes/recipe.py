"""A recipe: passes in order, as text that parses and prints the same.

``quantize{bits=4 group=32},easyquant{bits=4 include=[encoder.* pooler]}``: a name, then options in
braces, separated by spaces. A list stands in square brackets; a value with spaces or brackets
stands in double quotes. ``path{blocks=0-3,3,5-11}``: a value may go on after a comma.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..ir.core.errors import BadInput, near_misses
from ..ir.vocab.targets import Target
from .base import Pass
from .recipe_file import SUFFIXES, read_recipe_file
from .recipe_text import option_of, read
from .registry import pass_class
from .rules import check_order

FOLDER = Path(__file__).with_name("recipes")
"""The built-in recipes, one TOML file each."""
SCHEMES = {
    "W4A16": "clean{optional=true},quantize{bits=4 group=128}",
    "W8A16": "clean{optional=true},quantize{bits=8 group=0}",
    "W8A8": "clean{optional=true},w8a8",
}
"""Recipes by the names that llm-compressor and vLLM give to a scheme of weights: symmetric, in
groups of 128 inputs or a scale a row; activations stay floats, or are rounded to 8 bits by token
as the model runs (A8). Other files call them so."""


@dataclass(frozen=True)
class Step:
    """One pass of a recipe, with its options as they were written."""

    pass_: Pass
    options: tuple[tuple[str, Any], ...]

    def settled(self, target: Target) -> Step:
        """The step with what its pass leaves open as ``target`` wants it."""
        pass_ = self.pass_.settled(target)
        changed = {
            f.name: getattr(pass_, f.name)
            for f in fields(pass_)
            if getattr(pass_, f.name) != getattr(self.pass_, f.name)
        }
        return Step(pass_, tuple({**dict(self.options), **changed}.items())) if changed else self

    def __str__(self) -> str:
        if not self.options:
            return self.pass_.name
        body = " ".join(f"{name}={_print_option(value)}" for name, value in self.options)
        return f"{self.pass_.name}{{{body}}}"


@dataclass(frozen=True)
class Recipe:
    """Passes in order. ``str`` gives the text that ``parse`` takes."""

    steps: tuple[Step, ...]
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Raises ``BadInput`` on bad syntax, an unknown pass or option, a value out of range."""
        return checked(cls(tuple(make_step(name, options) for name, options in read(text))))

    @classmethod
    def of(cls, *passes: Pass | str) -> Recipe:
        """A recipe out of passes made in Python, or written as text; options at their defaults are
        left out. Raises ``BadInput`` for something else, and as ``parse``."""
        steps = []
        pass_: Any
        for pass_ in passes:
            if isinstance(pass_, str):
                steps += [make_step(name, options) for name, options in read(pass_)]
                continue
            if not isinstance(pass_, Pass):
                made = isinstance(pass_, type) and issubclass(pass_, Pass)
                what = f"a class: {pass_.__name__}() is a pass" if made else repr(pass_)
                raise BadInput(f"a recipe holds passes or their text, and this is {what}")
            options = tuple(
                (f.name, getattr(pass_, f.name))
                for f in fields(pass_)
                if f.default is MISSING or getattr(pass_, f.name) != f.default
            )
            steps.append(Step(pass_, options))
        return checked(cls(tuple(steps)))

    @classmethod
    def load(cls, name: str) -> Recipe:
        """A built-in recipe or a scheme by name, or a TOML or YAML file by path."""
        if name.upper() in SCHEMES:
            return replace(cls.parse(SCHEMES[name.upper()]), name=name.upper())
        path = Path(name) if name.endswith(SUFFIXES) else FOLDER / f"{name}.toml"
        if not path.is_file():
            hint = near_misses(name, [*recipe_names(), *SCHEMES])
            raise BadInput(f"there is no recipe {name!r}; {hint} (or give a .toml or .yaml file)")
        return _from_file(path)

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(step.pass_ for step in self.steps)

    def settled(self, target: Target) -> Recipe:
        """The recipe with what its passes leave open as ``target`` wants it, and saying so."""
        return Recipe(tuple(step.settled(target) for step in self.steps), self.name)

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.steps)


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def recipe_summary(name: str) -> str:
    """The one sentence that a recipe file says of itself."""
    return str(read_recipe_file(FOLDER / f"{name}.toml").get("summary", ""))


def _from_file(path: Path) -> Recipe:
    entries = read_recipe_file(path).get("passes")
    if not isinstance(entries, list) or not entries:
        shape = "[[passes]] tables" if path.suffix == ".toml" else "a list of passes"
        raise BadInput(f"{path}: a recipe holds {shape}, each with a name")
    try:
        return checked(Recipe(tuple(map(_entry_step, entries)), path.stem))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _entry_step(entry: object) -> Step:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str):
        raise BadInput("each of the passes needs a name, a text")
    options = [(str(key), value) for key, value in entry.items() if key != "name"]
    for key, value in options:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            raise BadInput(
                f"{name}: {key}={value} is wrong: expected a text, a number, true, false, or a "
                "list of these"
            )
    return make_step(name, [(k, tuple(v) if isinstance(v, list) else v) for k, v in options])


def checked(recipe: Recipe) -> Recipe:
    """The recipe itself. Raises ``BadInput`` where its passes do not go together: see ``rules``.

    Whether a pass that compensates has anything to do may depend on the source, which may have been
    compressed by others: that is for who knows it.
    """
    if not recipe.steps:
        raise BadInput("the recipe is empty: name at least one pass")
    check_order(recipe.passes, compressed=None)
    return recipe


def make_step(name: str, options: Sequence[tuple[str, Any]]) -> Step:
    """A pass from option texts or values. Raises ``BadInput`` naming the pass and the option."""
    pass_ = pass_class(name)
    hints = typing.get_type_hints(pass_)
    known = [f.name for f in fields(pass_)]
    values: dict[str, Any] = {}
    for written, raw in options:
        option = option_of(name, written, known)
        if option in values:
            raise BadInput(f"{name}: the option {option} is given twice")
        values[option] = _convert(name, option, raw, hints[option])
    return Step(pass_(**values), tuple(values.items()))


def _convert(name: str, option: str, raw: Any, hint: Any) -> Any:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    for kind in kinds:
        if kind is type(None):
            continue
        if typing.get_origin(kind) is tuple:
            return tuple(str(i) for i in raw) if isinstance(raw, tuple) else (str(raw),)
        converted = _scalar(raw, kind)
        if converted is not None:
            return converted
    expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        expected = "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    raise BadInput(f"{name}: {option}={_print(raw)} is wrong: expected {expected}")


def _scalar(raw: Any, kind: Any) -> Any:
    """The value of an option, or ``None`` where the text is no such value."""
    text = str(raw)
    if typing.get_origin(kind) is typing.Literal:
        return next((a for a in typing.get_args(kind) if str(a) == text), None)
    if isinstance(raw, tuple):
        return None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if kind is str:
        return text
    try:
        number = kind(text) if kind in (int, float) and not isinstance(raw, bool) else None
    except ValueError:
        return None
    return number if number is None or math.isfinite(number) else None


def _print_option(value: Any) -> str:
    """As ``_print``; outside of a list, a comma between plain words needs no quotes."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w.%-]+(,[\w.%-]+)+", value)
    return value if plain else _print(value)


def _print(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + " ".join(_print(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if text and not re.search(r'[\s{}\[\]=,"\\]', text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
