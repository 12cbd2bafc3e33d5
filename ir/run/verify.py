"""Checks of a graph: its structure, and its numbers against another graph's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.dims import dim_value
from ..core.errors import BadInput, InvalidGraph
from ..core.types import Dim, Type, agree
from ..core.view import NATIVE, Node, Value, View
from ..structure.cache_slots import PAST_AXIS, past_slot
from ..vocab import spec
from .masks import picked_tables

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


_SIZES = (2, 12, 7, 5, 3)
"""Sizes given to the symbolic dimensions in order of appearance: the batch first."""


def sample_inputs(
    view: View, *, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Random inputs that fit the graph: ids below the vocabulary's size, masks of ones, and one
    image a row where ``source.prompt`` says what stands for it.

    ``sizes`` fixes symbolic dimensions by name; sums of them follow. A key-value cache is empty
    and left out, unless ``sizes`` gives its length. Raises ``BadInput`` where an input's type is
    not known well enough.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, int] = dict(sizes or {})
    inputs: dict[str, torch.Tensor] = {}
    named = dict(zip(view.input_names(), view.inputs(), strict=True))
    if view.source.prompt:
        _make_room(view, named, chosen)
    lengths = {n: _length(view, v) for n, v in named.items() if past_slot(n) is not None}
    empty = {length for length in lengths.values() if length not in chosen}
    chosen |= dict.fromkeys(empty, 0)
    for name, value in named.items():
        if lengths.get(name) in empty:
            continue
        type_ = view.type(value)
        if type_.shape is None or type_.dtype is None:
            raise BadInput(f"input {name} has no type: give samples")
        shape = [_size(dim, chosen) for dim in type_.shape]
        inputs[name] = _sample(view, value, type_.dtype, shape, generator)
    if view.source.prompt:
        inputs["input_ids"] = _with_image(inputs["input_ids"], view.source.prompt)
    return inputs


def _make_room(view: View, named: Mapping[str, Value], chosen: dict[str, int]) -> None:
    """Sizes by which every row has a prompt of some words, and an image."""
    rows, seq = view.type(named["input_ids"]).shape or ("", "")
    images = (view.type(named["pixel_values"]).shape or ("",))[0]
    batch = chosen.setdefault(str(rows), _SIZES[0])
    chosen.setdefault(str(seq), len(view.source.prompt) + _SIZES[1])
    chosen.setdefault(str(images), batch)


def _with_image(ids: torch.Tensor, prompt: Sequence[int]) -> torch.Tensor:
    """``ids`` ``[rows, seq]`` with the image's tokens at the start of each row and nowhere else."""
    token, prompt = prompt[0], prompt[: ids.shape[1]]
    words = torch.where(ids == token, (token or 2) - 1, ids)
    return torch.cat([torch.tensor([prompt] * len(ids)), words[:, len(prompt) :]], 1)


def _length(view: View, cache: Value) -> str:
    """The name of a cache's length."""
    shape = view.type(cache).shape or ()
    return str(shape[PAST_AXIS]) if len(shape) > PAST_AXIS else ""


def _size(dim: Dim, chosen: dict[str, int]) -> int:
    """The size of a dimension; names without one get theirs, and sums of names follow from it."""
    known = dim_value(dim, chosen)
    if known is not None:
        return known
    for name in re.findall(r"\b[A-Za-z_]\w*\b(?!\()", str(dim)):
        chosen.setdefault(name, _next_size(chosen))
    known = dim_value(dim, chosen)
    if known is not None:
        return known
    return chosen.setdefault(str(dim), _next_size(chosen))


def _next_size(chosen: Mapping[str, int]) -> int:
    """Of the dimension that comes next; one that is empty, a cache's, takes no size from others."""
    return _SIZES[sum(size > 0 for size in chosen.values()) % len(_SIZES)]


def _sample(
    view: View, value: Value, dtype: torch.dtype, shape: list[int], generator: torch.Generator
) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    bound = _id_bound(view, value)
    if bound is None:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, bound, shape, generator=generator).to(dtype)


def _id_bound(view: View, value: Value) -> int | None:
    """Rows of the table that an integer input indexes; ``None`` for a mask."""
    for table, axis in picked_tables(view, value):
        shape = view.type(table).shape or ()
        # Where the graph does not say along which axis, an index below the least size is safe.
        rows = shape if axis is None else shape[axis : axis + 1]
        sizes = [size for size in rows if isinstance(size, int)]
        if sizes:
            return min(sizes)
    return None
