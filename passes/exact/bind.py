"""``bind``: an input that is always the same leaves, and what follows from it alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ...ir.core.errors import BadInput, near_misses
from ...ir.core.types import Type
from ...ir.core.view import NATIVE, Node, Value, View
from ...ir.run.sweep import run_part
from ...ir.structure.costs import weight_bytes
from ...ir.vocab import traits
from ...ir.vocab.builder import Builder
from ..base import Context, Pass, PassResult, Site
from ..narrowing import Inputs, Narrowing, Outputs


@dataclass(frozen=True, kw_only=True)
class Bind(Pass):
    """Give an input one value for good: ``f(x, y) => f_y(x)``, exact.

    What depends on it and on constants alone is computed now, and its weights leave: the text tower
    behind the class prompts of a CLIP, the whole of a tower whose picture stays the same.
    ``value`` is a ``.npy`` file (of a ``.npz`` the array of the input's name), or numbers with
    commas; one number fills an input, also one as long as another input is (``token_type_ids`` of
    zeros). An open dimension takes the size that the value has, as long as no other input has it
    too.
    """

    name: ClassVar[str] = "bind"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    input: str
    """The input that leaves."""
    value: str
    """FILE.npy, FILE.npz, or numbers: 0, or 1,2,3."""

    def run(self, context: Context) -> PassResult:
        view = context.view
        bound = self._input(view)
        tensor, twin = self._tensor(view, bound), self._twin(view, bound)
        before = weight_bytes(view)
        with view.made_by(self.name, context.step):
            if twin is None:
                count = _compute(view, bound, tensor, context)
            else:
                count = _fill(view, bound, twin, tensor)
        rest = zip(view.input_names(), view.inputs(), strict=True)
        view.set_inputs({name: value for name, value in rest if value is not bound})
        view.drop_unused_weights()
        context.edited()
        site = Site(
            name=self.input, kind="input", shape=tuple(tensor.shape), bytes_before=before,
            bytes_after=weight_bytes(view), note=f"{count} nodes computed ahead",
        )  # fmt: skip
        twin_name = None if twin is None else _name(view, twin)
        return PassResult(sites=[site], narrowing=_narrowing(self.input, tensor, twin_name))

    def plan(self, context: Context) -> PassResult:
        bound = self._input(context.view)
        tensor = self._tensor(context.view, bound)
        self._twin(context.view, bound)
        size = weight_bytes(context.view)
        site = Site(name=self.input, kind="input", shape=tuple(tensor.shape), bytes_before=size,
                    bytes_after=size, note="what leaves is known when it runs")  # fmt: skip
        return PassResult(sites=[site])

    def _input(self, view: View) -> Value:
        named = dict(zip(view.input_names(), view.inputs(), strict=True))
        if self.input not in named:
            raise BadInput(
                f"bind: there is no input {self.input}; {near_misses(self.input, named)}"
            )
        if len(named) == 1:
            raise BadInput(f"bind: {self.input} is the only input: nothing would be left to ask")
        return named[self.input]

    def _tensor(self, view: View, bound: Value) -> torch.Tensor:
        """The value, of the input's dtype and rank; ``[]`` where one number fills it."""
        declared = view.type(bound)
        array = _read(self.value, self.input)
        tensor = torch.from_numpy(array)
        if declared.dtype is not None and tensor.dtype != declared.dtype:
            cast = tensor.to(declared.dtype)
            if not torch.equal(cast.to(tensor.dtype), tensor) and not tensor.is_floating_point():
                raise BadInput(f"bind: {self.input} is {declared}, and {self.value} does not fit")
            tensor = cast
        shape = declared.shape
        if shape is None:
            raise BadInput(f"bind: the graph does not say which shape {self.input} has")
        if tensor.dim() == 0:
            fixed = [dim for dim in shape if isinstance(dim, int)]
            return tensor.expand(fixed).contiguous() if len(fixed) == len(shape) else tensor
        if tensor.dim() == 1 and tensor.numel() == Type(None, shape).numel:
            tensor = tensor.reshape([dim for dim in shape if isinstance(dim, int)])
        fits = tensor.dim() == len(shape) and all(
            not isinstance(dim, int) or dim == size
            for dim, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BadInput(
                f"bind: {self.input} is {declared}, and the value is "
                f"{Type(tensor.dtype, tuple(tensor.shape))}"
            )
        self._check_open(view, bound, shape)
        return tensor

    def _check_open(self, view: View, bound: Value, shape: Iterable[int | str]) -> None:
        open_ = {dim for dim in shape if isinstance(dim, str)}
        for name, value in zip(view.input_names(), view.inputs(), strict=True):
            shared = open_ & set(view.type(value).shape or ())
            if value is not bound and shared:
                raise BadInput(
                    f"bind: {min(map(str, shared))} is a size of {self.input} and of {name}: a "
                    "value would fix both. Give one number that fills it, or trace the model with "
                    "a size of its own for each"
                )

    def _twin(self, view: View, bound: Value) -> Value | None:
        """Of an input that one number fills, and whose size is open: another of the same shape."""
        shape = view.type(bound).shape or ()
        if self._tensor(view, bound).dim() or all(isinstance(dim, int) for dim in shape):
            return None
        for value in view.inputs():
            if value is not bound and view.type(value).shape == shape:
                return value
        raise BadInput(
            f"bind: {self.input} is {view.type(bound)}, one number does not say how long, and no "
            "other input is of that shape: give an array, as FILE.npy"
        )


def _read(text: str, name: str) -> np.ndarray:
    path = Path(text).expanduser()
    if path.suffix in (".npy", ".npz"):
        try:
            content = np.load(path, allow_pickle=False)
            return np.asarray(content if path.suffix == ".npy" else content[name])
        except KeyError:
            raise BadInput(
                f"bind: {path} holds no array {name}: it holds {list(content)}"
            ) from None
        except (OSError, ValueError) as error:
            raise BadInput(f"bind: {path}: {error}") from None
    try:
        numbers = [float(word) if set(word) & set(".e") else int(word) for word in text.split(",")]
    except ValueError:
        raise BadInput(f"bind: value={text} is no FILE.npy, and no numbers as 0 or 1,2,3") from None
    return np.array(numbers if len(numbers) > 1 else numbers[0])


def _fill(view: View, bound: Value, twin: Value, number: torch.Tensor) -> int:
    """x => 0 y + number, for ``y`` of the same shape"""
    users = view.users(bound)
    if not users:
        return 0
    first = next(node for node in view.nodes() if node in users)
    b = Builder(view, first)
    zero = b.mul(b.cast(twin, dtype=number.dtype), 0) if _dtype(view, twin) != number.dtype else (
        b.mul(twin, 0)
    )  # fmt: skip
    filled = zero if not number else b.add(zero, number.item())
    for user in users:
        view.rewire(user, bound, filled)
    return 0


def _compute(view: View, bound: Value, tensor: torch.Tensor, context: Context) -> int:
    """Put the results of what depends on ``bound`` and constants alone in its place; how many nodes
    that were."""
    known, inside = {bound}, []
    for node in view.nodes():
        arguments = view.arguments(node)
        fixed = all(v in known or view.weight(v) is not None for v in arguments)
        if not fixed or known.isdisjoint(arguments) or not _is_pure(view, node):
            continue
        inside.append(node)
        known.update(view.results(node))
    members = set(inside)
    read = [
        value for value in known
        if view.is_output(value) or any(user not in members for user in view.users(value))
    ]  # fmt: skip
    tensors = run_part(view, inside, {bound: [tensor]}, read)
    for value in read:
        constant = view.add_weight(
            f"{view.name(value)}.bound", context.spool.store(tensors[value][0].contiguous())
        )
        if view.is_output(value):
            after = next(iter(view.nodes()))
            constant = Builder(view, after).identity(constant)
        if value is bound:
            for user in view.users(value):
                view.rewire(user, value, constant)
            continue
        view.replace(value, constant)
    for node in reversed(inside):
        if not any(view.users(r) or view.is_output(r) for r in view.results(node)):
            view.erase(node)
    return len(inside)


def _is_pure(view: View, node: Node) -> bool:
    op = view.op(node)
    return view.is_pure_native(node) if op == NATIVE else traits(op).pure


def _narrowing(name: str, tensor: torch.Tensor, twin: str | None) -> Narrowing:
    def widen(inputs: Inputs) -> Inputs:
        value = tensor if twin is None else tensor.expand(inputs[twin].shape).contiguous()
        return {**inputs, name: value}

    def narrow(inputs: Inputs) -> Inputs:
        return {n: t for n, t in inputs.items() if n != name}

    def outputs(whole: Outputs) -> Outputs:
        return whole

    return Narrowing(widen, narrow, outputs)


def _name(view: View, value: Value) -> str:
    return dict(zip(view.inputs(), view.input_names(), strict=True))[value]


def _dtype(view: View, value: Value) -> torch.dtype | None:
    return view.type(value).dtype
