"""Checks of a graph: its structure, and its numbers against another graph's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.errors import InvalidGraph
from ..core.types import Type, agree
from ..core.view import NATIVE, Node, Value, View
from ..vocab import spec

EXACT_REL_L2: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Relative L2 that an exact rewrite may move an output by: rounding of a reordered sum over a few
hundred layers, 100 units in the last place and more (10 and less for the half types)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from another: ``|a-b|/|a|``, cosine of the two, greatest |a-b|."""

    rel_l2: float
    cosine: float
    max_abs: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.rel_l2)

    def to_dict(self) -> dict[str, float]:
        return {"rel_l2": self.rel_l2, "cosine": self.cosine, "max_abs": self.max_abs}


def difference(expected: torch.Tensor, actual: torch.Tensor) -> Difference:
    """Compare two tensors of one shape in float64.

    Equal infinities and equal NaNs count as agreement; any other non-finite value gives infinite
    errors. Raises ``InvalidGraph`` where the shapes differ.
    """
    return joint_difference([expected], [actual])


def joint_difference(
    expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]
) -> Difference:
    """``difference`` of tensors laid end to end.

    No more than ``_PIECE`` numbers are widened at a time: logits over a large vocabulary would
    take gigabytes in float64.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    largest, finite = 0.0, True
    for whole_a, whole_b in zip(expected, actual, strict=True):
        if whole_a.shape != whole_b.shape:
            raise InvalidGraph(
                f"shapes differ: {list(whole_a.shape)} became {list(whole_b.shape)}"
            )
        sides = (torch.split(whole.reshape(-1), _PIECE) for whole in (whole_a, whole_b))
        pieces = zip(*sides, strict=True)
        for a, b in ((a.double(), b.double()) for a, b in pieces if a.numel()):
            gap = a - b
            if not bool(torch.isfinite(gap).all()):
                a, b = _without_agreed(a, b)
                gap = a - b
                finite = finite and bool(torch.isfinite(gap).all())
            sums += torch.stack([gap.dot(gap), a.dot(a), b.dot(b), a.dot(b)])
            largest = max(largest, float(gap.abs().max()))
    if not finite:
        return Difference(math.inf, 0.0, math.inf)
    gap_square, a_square, b_square, product = sums.tolist()
    if gap_square == 0.0:
        return Difference(0.0, 1.0, 0.0)
    rel = math.sqrt(gap_square / a_square) if a_square > 0 else math.inf
    norms = math.sqrt(a_square) * math.sqrt(b_square)
    cosine = product / norms if norms > 0 else 0.0
    return Difference(rel, max(-1.0, min(1.0, cosine)), largest)


_PIECE = 1 << 18


def _without_agreed(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros where both hold the same infinity, or both hold NaN."""
    same = ~torch.isfinite(a) & ((a == b) | (torch.isnan(a) & torch.isnan(b)))
    return torch.where(same, 0.0, a), torch.where(same, 0.0, b)


def compare(
    expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]
) -> dict[str, Difference]:
    """``difference`` of each output by name. Raises ``InvalidGraph`` where the names differ."""
    return compare_batches([expected], [actual])


def compare_batches(
    expected: Sequence[Mapping[str, torch.Tensor]], actual: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, Difference]:
    """``compare`` of each output over all batches together."""
    names = list(expected[0])
    if set(names) != set(actual[0]):
        raise InvalidGraph(f"outputs changed from {sorted(names)} to {sorted(actual[0])}")
    return {
        name: joint_difference([e[name] for e in expected], [a[name] for a in actual])
        for name in names
    }


def exact_tolerance(dtype: torch.dtype) -> float:
    """The bound on ``rel_l2`` for an exact rewrite of an output of this dtype."""
    return EXACT_REL_L2.get(dtype, 0.0)


def tolerance(view: View) -> float:
    """``exact_tolerance`` of the coarsest float dtype that the graph computes in."""
    dtypes = {view.type(value).dtype for node in view.nodes() for value in view.results(node)}
    return max(exact_tolerance(dtype) for dtype in {*dtypes, torch.float32} if dtype is not None)


def check_structure(view: View) -> None:
    """Use-def order, unique names, present weights, agreeing types.

    Raises ``InvalidGraph`` at the first fault, naming the node.
    """
    available: set[Value] = set(view.inputs())
    names: set[str] = set()
    for node in view.nodes():
        for value in view.arguments(node):
            if value not in available and view.weight(value) is None and _computed(view, value):
                raise InvalidGraph(
                    f"{view.name(node)} uses {view.name(value)} before it is computed"
                )
        for value in view.results(node):
            name = view.name(value)
            if not name:
                continue  # ONNX's way to leave out a result that is not the last
            if name in names:
                raise InvalidGraph(f"the name {name} stands for two values")
            names.add(name)
            available.add(value)
        _check_types(view, node)
    for value in view.outputs():
        if value not in available and view.weight(value) is None:
            raise InvalidGraph(f"the output {view.name(value)} is never computed")


def _computed(view: View, value: Value) -> bool:
    """False for a constant that has no handle (a string tensor, say): it is there all the same."""
    return view.producer(value) is not None or getattr(value, "const_value", None) is None


def _check_types(view: View, node: Node) -> None:
    op = view.op(node)
    if op == NATIVE:
        return
    operands = [
        o if o is None or isinstance(o, int | float | bool) else view.type(o)
        for o in view.operands(node)
    ]
    try:
        inferred = spec(op).infer(operands, view.attrs(node))
    except ValueError as error:
        raise InvalidGraph(f"{view.name(node)}: {op} does not fit its operands: {error}") from None
    results = view.results(node)
    if len(results) != len(inferred):
        return  # FX has no value for a result that nobody takes, so positions are not told apart
    for value, type_ in zip(results, inferred, strict=True):
        declared = view.type(value)
        if not agree(Type(None, type_.shape), Type(None, declared.shape)):
            raise InvalidGraph(
                f"{view.name(node)}: {op} gives {type_}, but the graph says {declared}"
            )
