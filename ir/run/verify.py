"""Checks of a graph: its structure, and its numbers against another graph's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..core.errors import InvalidGraph
from ..core.types import Type, agree
from ..core.view import NATIVE, Node, Value, View
from ..vocab import spec, traits

EXACT_REL_L2: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Relative L2 that an exact rewrite may move an output by: rounding of a reordered sum over a few
hundred layers, 100 units in the last place and more (10 and less for the half types)."""
RUNTIME_REL_L2: dict[torch.dtype, float] = EXACT_REL_L2 | {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
}
"""The same between two runtimes, whose every sum may run in another order: in float32 a few hundred
layers stay below 2e-5. Their exponentials and roots differ too."""
ROUNDED_REL_L2 = 2e-2
"""The same where activations are rounded to 8 bits: a sum in another order turns a rounding here
and there, which the layers after it amplify (a trained transformer of 12 layers: .0099)."""
COARSE_SLACK = 1.5
"""See ``Rule``."""
HALF_LIMIT = 4
"""Tolerances that a graph in half types may be from itself in float32 for that to decide: a
Phi-4-multimodal of random weights is two, 9.4e-3 in float16. Of one that overflows, or is nowhere
near, float32 would let anything pass."""
NEAR_ZERO = 1e-3
"""Root mean square below which an output is judged absolutely: see ``Difference.within``."""

_Outputs: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from another: ``|a-b|/|a|``, cosine of the two, greatest |a-b|; and the
    root mean square of a-b, infinite where it is not known. Of ids and flags ``rel_l2`` is the
    share that differ: 50001 is no better an answer than 7 where 50000 is right."""

    rel_l2: float
    cosine: float
    max_abs: float
    rms: float = math.inf

    @property
    def finite(self) -> bool:
        return math.isfinite(self.max_abs)

    def within(self, bound: float) -> bool:
        """``|a-b| <= bound * max(|a|, NEAR_ZERO)``, as root mean squares.

        Relative to a source of zeros, or of what is left of numbers that cancel, any rounding is
        infinite; there it is the difference itself that must be small.
        """
        return self.rel_l2 <= bound or self.rms <= bound * NEAR_ZERO

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
    largest, finite, unequal = 0.0, True, 0
    count = sum(whole.numel() for whole in expected)
    for whole_a, whole_b in zip(expected, actual, strict=True):
        if whole_a.shape != whole_b.shape:
            raise InvalidGraph(f"shapes differ: {list(whole_a.shape)} became {list(whole_b.shape)}")
        sides = (torch.split(whole.reshape(-1), _PIECE) for whole in (whole_a, whole_b))
        pieces = zip(*sides, strict=True)
        for a, b in ((_real(a), _real(b)) for a, b in pieces if a.numel()):
            gap = a - b
            unequal += int(gap.count_nonzero())
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
        return Difference(0.0, 1.0, 0.0, 0.0)
    rel = math.sqrt(gap_square / a_square) if a_square > 0 else math.inf
    norms = math.sqrt(a_square) * math.sqrt(b_square)
    cosine = product / norms if norms > 0 else 0.0
    if expected[0].dtype in _IDS:
        return Difference(unequal / count, max(-1.0, min(1.0, cosine)), largest)
    rms = math.sqrt(gap_square / count)
    return Difference(rel, max(-1.0, min(1.0, cosine)), largest, rms)


_PIECE = 1 << 18
_IDS = (torch.int64, torch.int32, torch.bool)
"""Dtypes of ids, places and flags. Whole numbers of 8 bits are quantities, and may round apart."""


def _real(piece: torch.Tensor) -> torch.Tensor:
    """In float64; of complex numbers both parts, one after the other."""
    return (torch.view_as_real(piece).flatten() if piece.is_complex() else piece).double()


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


def worst_of(
    expected: Sequence[Mapping[str, torch.Tensor]],
    actual: Sequence[Mapping[str, torch.Tensor]],
    *,
    shortened: bool = False,
) -> dict[str, Difference]:
    """The error of each output over all batches together.

    Where tokens were dropped (``shortened``), an output with fewer positions is compared at its
    last one.
    """  # fmt: skip
    if shortened:
        pairs = [_last_positions(a, b) for a, b in zip(expected, actual, strict=True)]
        expected, actual = [a for a, _ in pairs], [b for _, b in pairs]
    for before, after in zip(expected, actual, strict=True):
        for name, tensor in before.items():
            if name in after and after[name].shape != tensor.shape:
                raise InvalidGraph(
                    f"the output {name} changed its shape from {list(tensor.shape)} to "
                    f"{list(after[name].shape)}"
                )
    return compare_batches(expected, actual)


def _last_positions(expected: _Outputs, actual: _Outputs) -> tuple[_Outputs, _Outputs]:
    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        a, b = expected[name].shape, actual[name].shape
        shorter = len(a) == len(b) >= 2 and a[1] > b[1] and (a[0], *a[2:]) == (b[0], *b[2:])
        return tensor[:, -1:] if shorter else tensor

    common = [name for name in expected if name in actual]
    return (
        {**expected, **{name: cut(name, expected[name]) for name in common}},
        {**actual, **{name: cut(name, actual[name]) for name in common}},
    )


def exact_tolerance(dtype: torch.dtype) -> float:
    """The bound on ``rel_l2`` for an exact rewrite of an output of this dtype."""
    return EXACT_REL_L2.get(dtype, 0.0)


def worst(errors: Mapping[str, Difference]) -> Difference:
    """The error of the output that is furthest off."""
    return max(errors.values(), key=lambda d: d.rel_l2)


def tolerance(view: View) -> float:
    """``exact_tolerance`` of the coarsest float dtype that the graph computes in."""
    return max(map(exact_tolerance, _dtypes(view)))


def runtime_tolerance(view: View) -> float:
    """What two runtimes may differ by on the graph: of ``RUNTIME_REL_L2`` the coarsest dtype's, and
    ``ROUNDED_REL_L2`` where activations are rounded."""
    rounded = ROUNDED_REL_L2 if rounds_activations(view) else 0.0
    return max(rounded, *(RUNTIME_REL_L2.get(dtype, 0.0) for dtype in _dtypes(view)))


def _dtypes(view: View) -> set[torch.dtype]:
    dtypes = {view.type(value).dtype for node in view.nodes() for value in view.results(node)}
    return {torch.float32} | {dtype for dtype in dtypes if dtype is not None}


ROUNDING_OPS = re.compile(r"(?<!De)Quantize(?!d)|QLinear|QGemm|QAttention|Integer")
"""In the names of ONNX ops that round to 8 bits what is computed."""


def rounds_activations(view: View) -> bool:
    """Whether a node rounds what is computed to 8 bits."""
    return _rounds_natively(view) or any(
        traits(view.op(node)).rounds
        or view.attrs(node).get("accuracy_level") == 4
        or _is_coded(view, node)
        for node in view.nodes()
        if view.op(node) != NATIVE
    )


def _is_coded(view: View, node: Node) -> bool:
    """Whether a node makes codes of 8 bits or fewer of numbers, such as those of a cache."""
    if view.op(node) != "cast" or view.attrs(node)["dtype"] not in (torch.int8, torch.uint8):
        return False
    dtype = view.type(view.tensor(node)).dtype
    return dtype is not None and dtype.is_floating_point


def _rounds_natively(view: View) -> bool:
    """By ops of ONNX's own, which the runtime's optimisation joins to integer arithmetic."""
    rounding = (n for n in view.nodes() if ROUNDING_OPS.search(view.native_op(n)))
    return any(view.weight(a) is None for node in rounding for a in view.arguments(node)[:1])


@dataclass(frozen=True)
class Rule:
    """When an artifact computes what its graph says: the rule by which one is published.

    It does where it gives, within the tolerance between two runtimes, what the reference
    interpreter makes of the graph. Where arithmetic is coarse (half types, activations that ops of
    their own round to 8 bits; of ``accuracy_level`` see ``backends.artifacts.judging``) two sound
    runs may differ by more, for their roundings have little in common. What decides then is the
    source, as its own runtime runs it: the artifact may be ``COARSE_SLACK`` times as far from it as
    the graph is by the reference, and a tolerance. In half types the source may round just as the
    reference does (both are torch's); then the same nodes in float32 decide, from which the
    artifact may be ``COARSE_SLACK`` times as far as the graph is, where that is no more than
    ``HALF_LIMIT`` tolerances: what is wrong may hide in a rounding of its size. Every distance is
    relative, and absolute near zero: see ``Difference.within``.
    """

    bound: float
    """Between the artifact and its graph."""
    coarse: bool
    """Whether the source decides where that is not kept."""
    rounding: float
    """The tolerance that is added to the distance from the source."""
    half: bool
    """Whether the graph computes in half types, and float32 may decide."""

    @classmethod
    def of(cls, graph: View) -> Rule:
        bound = max(RUNTIME_REL_L2[torch.float32], tolerance(graph))
        coarse = bound > RUNTIME_REL_L2[torch.float32] or rounds_activations(graph)
        # Joined to integer arithmetic, or in half types left out:
        # see ``backends.runtimes.original``.
        half = bound > RUNTIME_REL_L2[torch.float32]
        loose = _rounds_natively(graph) or (half and rounds_activations(graph))
        return cls(bound, coarse, ROUNDED_REL_L2 if loose else bound, half)

    def allows(self, to_graph: Difference) -> bool:
        return to_graph.within(self.bound)

    def allows_beside(self, to_source: Difference, graph_to_source: Difference) -> bool:
        """The same by the source: how far the artifact and its graph are from it."""
        return self.coarse and to_source.within(
            COARSE_SLACK * graph_to_source.rel_l2 + self.rounding
        )

    def allows_in_half(self, to_exact: Difference, graph_to_exact: Difference) -> bool:
        """The same by float32: how far the artifact and its graph are from the graph's nodes in
        it."""
        far = graph_to_exact.rel_l2
        near = self.half and far <= HALF_LIMIT * self.bound
        return near and to_exact.within(COARSE_SLACK * far)

    def explains(self, to_plain: Difference, moved: Difference) -> bool:
        """Whether rounding of activations explains how far a run is from one without it: the
        reference interpreter's own rounding has ``moved`` that output so far. Of ten logits one
        run's rounding may be half of another's: ``ROUNDED_REL_L2`` is granted to all."""
        granted = max(COARSE_SLACK * moved.rel_l2, ROUNDED_REL_L2)
        return to_plain.within(granted + self.bound)


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
