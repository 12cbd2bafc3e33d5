"""The graph as text, one op a line, for both graph kinds: ``print(parse(print(g))) == print(g)``.

Header lines declare inputs and weights; then come the ops, then the outputs::

    fx graph
    input %x: f32[batch, 5]
    weight @w: f32[3, 5]
    weight @scale: f32[] = [0.5]
    %linear: f32[batch, 3] = linear(%x, @w)
    %mul: f32[batch, 3] = mul(%linear, @scale)
    output y = %mul

``%`` marks computed values and inputs, ``@`` weights. A weight of up to 16 elements is written with
its numbers; a larger one has a type only, and is an ``AbsentWeight`` once parsed. Ops outside the
vocabulary keep their own names (``aten.foo.default``, ``ai.onnx::Shape``). Attributes at their
defaults, weights that nothing uses, metadata and module scopes are left out. ``_`` stands for a
result that nobody takes; several results are in parentheses. Lines that begin with ``#`` say
nothing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..core.errors import BadInput, Missing, Refusal, near_misses
from ..core.types import parse_type
from ..core.view import Node, Value, View
from ..core.weights import AbsentWeight, MemoryWeight, Weight
from ..vocab import REQUIRED, VOCABULARY, is_known, spec
from . import fx, onnx
from .syntax import Reader, Ref, write_literal

MAX_NUMBERS = 16
"""Weights of up to this many elements are written out."""

_FORMS: dict[str, Any] = {"fx": fx, "onnx": onnx}


def print_graph(view: View) -> str:
    """The graph as text that ``parse_graph`` reads.

    Raises ``BadInput`` where the graph holds what has no text form: a submodule, a Python function
    outside of arithmetic, a constant of strings or of integers narrower than a byte.
    """
    return _Printer(view).text()


def parse_graph(text: str) -> View:
    """The graph that a text describes, without a program to export by where it is an FX graph.

    Raises ``BadInput`` with the number of the line that cannot be read.
    """
    return _Parser(text).view()


def diff_graphs(a: View, b: View) -> str:
    """A unified diff of two graphs; empty where they print the same."""
    before, after = print_graph(a).splitlines(), print_graph(b).splitlines()
    lines = difflib.unified_diff(before, after, "before", "after", lineterm="", n=2)
    return "".join(f"{line}\n" for line in lines)


class _Printer:
    def __init__(self, view: View) -> None:
        self.view = view
        self.form = _FORMS[view.kind]
        self.refs: dict[Value, Ref] = {}
        self.taken: set[str] = set()
        self.used: set[str] = set()

    def text(self) -> str:
        view = self.view
        self.form.check(view)
        inputs = []
        for index, value in enumerate(view.inputs()):
            ref = self._define(value, self.form.input_name(view, value, index))
            inputs.append(f"input {ref}: {self.form.type_text(view, value)}")
        body = [self._line(node) for node in view.nodes()]
        for name, value in zip(view.output_names(), view.outputs(), strict=True):
            body.append(f"output {Ref('', name)} = {self._ref(value)}")
        weights = [_weight_line(n, w) for n, w in view.weights().items() if n in self.used]
        return "\n".join(
            [f"{view.kind} graph", *self.form.header(view), *inputs, *weights, *body, ""]
        )

    def _line(self, node: Node) -> str:
        op, operands, attrs = self.form.form(self.view, node)
        known = is_known(op)
        for value in () if known else self.view.arguments(node):
            self._ref(value)  # a subgraph may read a weight that the line does not show
        defaults = spec(op).attrs if known else {}
        try:
            inside = ", ".join(write_literal(o, self._ref) for o in operands)
            shown = [
                f"{key} = {write_literal(value, self._ref)}"
                for key, value in attrs.items()
                if not _is_default(value, defaults.get(key, REQUIRED))
            ]
        except ValueError as error:
            raise BadInput(f"{self.view.name(node)}: {error}") from None
        tail = f" {{{', '.join(shown)}}}" if shown else ""
        return f"{self._left(node)} = {op}({inside}){tail}"

    def _left(self, node: Node) -> str:
        values, several = self.form.results(self.view, node)
        items = []
        for value in values:
            if value is None:
                items.append("_")
                continue
            ref = self._define(value, self.view.name(value))
            items.append(f"{ref}: {self.form.type_text(self.view, value)}")
        return f"({', '.join(items)})" if several else items[0]

    def _define(self, value: Value, name: str) -> Ref:
        unique, count = name, 0
        while unique in self.taken:
            count += 1
            unique = f"{name}_{count}"
        self.taken.add(unique)
        self.refs[value] = Ref("%", unique)
        return self.refs[value]

    def _ref(self, value: Value) -> Ref:
        value = self.form.canonical(self.view, value)
        ref = self.refs.get(value)
        if ref is not None:
            return ref
        name = self.view.name(value)
        if self.view.weight(value) is None:
            raise BadInput(f"{name} is used before it is computed")
        self.used.add(name)
        return Ref("@", name)


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _weight_line(name: str, weight: Weight) -> str:
    line = f"weight {Ref('@', name)}: {weight.type}"
    if weight.numel > MAX_NUMBERS or weight.dtype.is_complex:
        return line
    try:
        tensor = weight.read()
    except Missing:
        return line
    numbers = tensor.double() if weight.dtype.is_floating_point else tensor
    return f"{line} = {numbers.reshape(-1).tolist()}"


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = [
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#")
        ]
        self.env: dict[Ref, Value] = {}
        self.outputs: list[tuple[str, Value]] = []
        self.begun = False
        self.maker: Any = None

    def view(self) -> View:
        kind = self.lines[0][1].removesuffix(" graph") if self.lines else ""
        if kind not in _FORMS:
            raise BadInput("line 1: a graph begins with the line 'fx graph' or 'onnx graph'")
        self.maker = _FORMS[kind].Maker()
        self.maker.reserve(_defined(self.lines))
        for number, line in self.lines[1:]:
            try:
                self._line(Reader(line))
            except (ValueError, TypeError, Refusal, BadInput) as error:
                raise BadInput(f"line {number}: {error}") from None
        if not self.outputs:
            raise BadInput(f"line {self.lines[-1][0]}: the graph ends without an output")
        view: View = self.maker.finish(self.outputs)
        return view

    def _line(self, reader: Reader) -> None:
        if reader.peek("%") or reader.peek("("):
            self.begun = True
            self._op(reader)
            return
        word = reader.word()
        if word == "output":
            name = reader.name()
            reader.need("=")
            self.outputs.append((name, self._value(reader.ref())))
        elif self.begun:
            raise ValueError(f"{word!r} must come before the first op")
        elif word in ("input", "weight"):
            self._declare(word, reader)
        elif not self.maker.header(word, reader):
            raise ValueError(f"{word!r} begins no line; known: input, weight, output, %name")
        reader.end()

    def _declare(self, word: str, reader: Reader) -> None:
        ref = reader.ref()
        if ref.sigil != {"input": "%", "weight": "@"}[word]:
            raise ValueError(f"an input is written %name and a weight @name, not {ref}")
        reader.need(":")
        text = reader.type_text()
        if word == "input":
            self._bind(ref, self.maker.input(ref.name, text))
            return
        numbers = reader.literal() if reader.take("=") else None
        self._bind(ref, self.maker.weight(ref.name, _weight(ref.name, text, numbers)))

    def _op(self, reader: Reader) -> None:
        several = reader.take("(")
        results: list[tuple[str, str] | None] = [] if several else [self._result(reader)]
        while several and not reader.take(")"):
            results.append(self._result(reader))
            if not reader.peek(")"):
                reader.need(",")
        reader.need("=")
        op = reader.op()
        if "." not in op and "::" not in op and not is_known(op):
            raise ValueError(f"unknown op {op!r}; {near_misses(op, VOCABULARY)}")
        operands, attrs = reader.operands(), reader.attrs()
        reader.end()
        values = self.maker.op(
            op,
            self._resolved(operands),
            {k: self._resolved(v) for k, v in attrs.items()},
            results,
            several,
        )
        for result, value in zip(results, values, strict=True):
            if result is not None:
                self._bind(Ref("%", result[0]), value)

    def _result(self, reader: Reader) -> tuple[str, str] | None:
        if reader.take("_"):
            return None
        ref = reader.ref()
        reader.need(":")
        if ref.sigil != "%":
            raise ValueError(f"the result of an op is written %name, not {ref}")
        return ref.name, reader.type_text()

    def _resolved(self, literal: Any) -> Any:
        if isinstance(literal, Ref):
            return self._value(literal)
        if isinstance(literal, list):
            return [self._resolved(v) for v in literal]
        return tuple(self._resolved(v) for v in literal) if isinstance(literal, tuple) else literal

    def _value(self, ref: Ref) -> Value:
        if ref not in self.env:
            raise ValueError(f"{ref} is used before it is defined")
        return self.env[ref]

    def _bind(self, ref: Ref, value: Value) -> None:
        if ref in self.env:
            raise ValueError(f"{ref} is defined twice")
        self.env[ref] = value


def _defined(lines: Sequence[tuple[int, str]]) -> set[str]:
    """Every name that a ``%`` or ``@`` marks anywhere, read roughly: names to stay clear of."""
    names: set[str] = set()
    for _, line in lines:
        reader = Reader(line)
        for at, sign in enumerate(line):
            if sign not in "%@":
                continue
            reader.at = at + 1
            try:
                names.add(reader.name())
            except ValueError:
                continue
    return names


def _weight(name: str, text: str, numbers: Any) -> Weight:
    type_ = parse_type(text)
    dtype, shape = type_.dtype, type_.shape
    if dtype is None or shape is None or type_.numel is None:
        raise ValueError(f"the weight @{name} needs a dtype and a shape of numbers, not {text}")
    sizes = tuple(int(d) for d in shape)
    if numbers is None:
        return AbsentWeight(name, sizes, dtype, "its numbers are not in the text of the graph")
    if not isinstance(numbers, list) or len(numbers) != math.prod(sizes):
        raise ValueError(f"@{name}: {math.prod(sizes)} numbers are needed, as [1.0, 2.0]")
    if not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"@{name}: only numbers can stand in a weight")
    wide = torch.float64 if dtype.is_floating_point else dtype
    return MemoryWeight(torch.tensor(numbers, dtype=wide).to(dtype).reshape(sizes))
