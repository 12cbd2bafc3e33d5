"""Linears that an artifact has as one product become several again.

See ``backends.onnx.forms.siblings``.

split(linear_nbit(x, a+b)) => linear_nbit(x, a), linear_nbit(x, b)
split(transpose(reshape(linear_nbit(x, a+b)))) => the same of each part, reshaped and transposed

The name of the joined weight says of which it is made, ``layers.0.q_proj+k_proj.codes``: a product
whose source has it as one is named otherwise, and stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.joined_weights import RowsWeight
from ..core.view import Node, Operand, Value, View, is_value
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from .heads import shaped

MARK = "+"


def joined_name(names: Sequence[str]) -> str | None:
    """One name for weights that are called alike but for one part between dots; ``None`` else."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) > 1 or any(MARK in name for name in names):
        return None
    differing = [i for i, words in enumerate(zip(*parts, strict=True)) if len(set(words)) > 1]
    if len(differing) != 1:
        return None
    (place,) = differing
    together = MARK.join(p[place] for p in parts)
    return ".".join([*parts[0][:place], together, *parts[0][place + 1 :]])


def parted_names(name: str) -> list[str]:
    """The names that ``joined_name`` made one of; the name alone where it made none."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if MARK in part]
    if len(places) != 1:
        return [name]
    (place,) = places
    return [".".join([*parts[:place], own, *parts[place + 1 :]])
            for own in parts[place].split(MARK)]  # fmt: skip


class PartSiblings(Rule):
    """split(linear_nbit(x, a+b)) => linear_nbit(x, a), linear_nbit(x, b)"""

    name = "part-siblings"

    def pattern(self, p: Any, x: Any, codes: Any) -> Any:
        return p.split(p.linear_nbit(x, codes, rest=True))

    def where(self, match: Match) -> None:
        linear, sizes = self.linear(match), match.view.attrs(match.root)["sizes"]
        if match.view.attrs(match.root)["dim"] != self.axis(match):
            match.refuse("it is split along another dimension")
        operands = match.view.operands(linear)[1:]
        for operand in filter(is_value, operands):
            names = parted_names(match.view.name(operand))
            if match.view.weight(operand) is None or len(names) != len(sizes):
                match.refuse(f"{match.view.name(operand)} is not {len(sizes)} weights in one")

    def replace(self, build: Build, **bound: Operand) -> Sequence[Value]:
        results, start = [], 0
        for index, width in enumerate(self.widths(build.match)):
            end = start + width
            results.append(self.part(build, index, start, end))
            start = end
        return results

    def linear(self, match: Match) -> Node:
        return next(n for n in match.nodes if match.view.op(n) == "linear_nbit")

    def axis(self, match: Match) -> int:
        """The dimension along which the parts lie."""
        return len(match.view.type(match.view.tensor(match.root)).shape or ()) - 1

    def widths(self, match: Match) -> Sequence[int]:
        """Features of each part."""
        sizes: Sequence[int] = match.view.attrs(match.root)["sizes"]
        return sizes

    def part(self, build: Build, index: int, start: int, end: int) -> Value:
        view, linear = build.view, self.linear(build.match)
        x, *stored = view.operands(linear)
        rows = [_rows(view, operand, index, start, end) for operand in stored]
        attrs = {**view.attrs(linear), "out_features": end - start}
        return build.linear_nbit(x, *rows, **attrs)


def _rows(view: View, operand: Operand, index: int, start: int, end: int) -> Operand:
    handle = view.weight(operand)
    if handle is None or not is_value(operand):
        return operand
    name = parted_names(view.name(operand))[index]
    return view.add_weight(name, RowsWeight(handle, start, end))


class PartSiblingHeads(PartSiblings):
    """split(transpose(reshape(linear_nbit(x, a+b)))) => transpose(reshape(linear_nbit(x, a))), …"""

    name = "part-sibling-heads"

    def pattern(self, p: Any, x: Any, codes: Any) -> Any:
        linear = p.linear_nbit(x, codes, rest=True)
        return p.split(p.transpose(p.reshape(linear, rest=True), perm=(0, 2, 1, 3)))

    def where(self, match: Match) -> None:
        super().where(match)
        shape = match.view.type(match.view.tensor(match.root)).shape or ()
        if len(shape) != 4 or not isinstance(shape[3], int):
            match.refuse("the width of its heads is not known")

    def axis(self, match: Match) -> int:
        return 1

    def widths(self, match: Match) -> Sequence[int]:
        return [heads * self._width(match) for heads in super().widths(match)]

    def part(self, build: Build, index: int, start: int, end: int) -> Value:
        width, own = self._width(build.match), super().part(build, index, start, end)
        apart = shaped(build, own, (own, 0), (own, 1), (end - start) // width, width)
        return build.transpose(apart, perm=(0, 2, 1, 3))

    def _width(self, match: Match) -> int:
        shape = match.view.type(match.view.tensor(match.root)).shape or ()
        return int(shape[3])


RULES: tuple[type[Rule], ...] = (PartSiblings, PartSiblingHeads)
