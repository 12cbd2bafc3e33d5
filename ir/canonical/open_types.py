"""The sizes that onnx's inference does not follow: it makes a name up (``unk__7``) for each."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.errors import Refusal
from ..core.types import UNKNOWN_DIM, Dim, Type, broadcast
from ..core.view import NATIVE, Node, View
from ..onnx.foreign import MADE_UP, is_foreign, names_of
from ..onnx.forms import native_node, native_value
from ..onnx.parts import set_type
from ..rewrite.shapes import Sizes
from ..vocab.onnx import attribute


def settle_types(view: View) -> None:
    """Type anew what has sizes of names that inference made up, in one pass along the graph.

    The positions that a decoder makes for itself, ``Range(0, Shape(x)[1])``, are as many as its
    tokens; inference calls them otherwise, and all that they are added to.
    """
    types = OpenTypes(view)
    for node in view.nodes():
        types.settle(node)


class OpenTypes:
    """Types nodes that are given in the order of the graph: by the rules of the vocabulary, and
    by what is known of the sizes that nodes compute."""

    def __init__(self, view: View) -> None:
        self._view, self._sizes = view, Sizes(view)
        face = [*view.inputs(), *view.outputs()]
        names = {name for value in face for name in names_of(view.type(value).shape or ())}
        self._known = {name for name in names if not name.startswith(MADE_UP)}
        self._known |= {n for v in view.inputs() for n in names_of(view.type(v).shape or ())}

    def settle(self, node: Node) -> None:
        view, dims = self._view, self._sizes.note(node)
        if view.op(node) == NATIVE:
            self._settle_native(node, dims)
            return
        before = {result: view.type(result) for result in view.results(node)}
        if not any(map(self._is_open, before.values())):
            return
        try:
            view.refresh_type(node)
        except Refusal:
            return
        self._take_target(node)
        for result, known in before.items():
            set_type(native_value(result), self._better(known, view.type(result)))

    def forget(self, node: Node) -> None:
        """Open the sizes of a node's results that inference made names up for: those of the nodes
        that take its place are known better."""
        for result in self._view.results(node):
            type_ = self._view.type(result)
            dims = [UNKNOWN_DIM if self._is_free(dim) else dim for dim in type_.shape or ()]
            set_type(native_value(result), type_.with_shape(type_.shape and dims))

    def _settle_native(self, node: Node, dims: Any) -> None:
        """The two native ops that exporters put between fused ones."""
        view, op = self._view, self._view.native_op(node)
        if op == "Shape" and isinstance(dims, tuple):
            self._declare(node, Type(torch.int64, (len(dims),)))
        elif op == "Gemm" and self._is_open(view.type(view.result(node))):
            attrs = view.attrs(node)
            x, w = (view.type(view.tensor(node, i)) for i in (0, 1))
            if x.rank == 2 and w.rank == 2 and x.shape and w.shape:
                sizes = x.shape[bool(attrs.get("transA", 0))], w.shape[not attrs.get("transB", 0)]
                self._declare(node, Type(x.dtype, sizes))

    def _take_target(self, node: Node) -> None:
        """The sizes of a result that is as long as others compute."""
        view, op, operands = self._view, self._view.op(node), self._view.operands(node)
        if op == "arange" and (operands[0], operands[2]) == (0, 1):
            end = self._sizes.of(operands[1])
            if isinstance(end, int | str):
                self._declare(node, view.type(view.result(node)).with_shape((end,)))
        elif op in ("reshape", "expand") and len(operands) == 2:
            dims = self._sizes.of(operands[1])
            shape = self._target(node, dims) if isinstance(dims, tuple) else None
            if shape is not None:
                self._declare(node, view.type(view.tensor(node)).with_shape(shape))

    def _target(self, node: Node, dims: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
        before = self._view.type(self._view.tensor(node)).shape
        if self._view.op(node) == "expand":
            with contextlib.suppress(ValueError):  # the node's own failure, where it is run
                return broadcast(before, dims)
            return None
        if attribute(native_node(node), "allowzero", 0):
            return None
        sizes: Mapping[int, Dim] = dict(enumerate(before or ()))
        shape = [sizes.get(i, UNKNOWN_DIM) if d == 0 else d for i, d in enumerate(dims)]
        others = [d for d in shape if d != -1]
        return tuple(_rest(before, others) if d == -1 else d for d in shape)

    def _declare(self, node: Node, type_: Type) -> None:
        set_type(native_value(self._view.result(node)), type_)

    # --- what is open -----------------------------------------------------------------------------

    def _is_open(self, type_: Type) -> bool:
        return type_.dtype is None or type_.shape is None or any(map(self._is_free, type_.shape))

    def _is_free(self, dim: Dim) -> bool:
        return dim == UNKNOWN_DIM or is_foreign(dim, self._known)

    def _better(self, known: Type, inferred: Type) -> Type:
        """Of each size the better of two: a name that was made up still says what equals what."""
        dtype = known.dtype or inferred.dtype
        if known.shape is None or inferred.shape is None or known.rank != inferred.rank:
            return Type(dtype, inferred.shape or known.shape)
        pairs = zip(known.shape, inferred.shape, strict=True)
        return Type(
            dtype, tuple(b if self._is_free(a) and b != UNKNOWN_DIM else a for a, b in pairs)
        )


def _rest(whole: tuple[Dim, ...] | None, parts: Sequence[Dim]) -> Dim:
    """The size that is left of ``whole`` when ``parts`` are taken off: ``batch`` of ``[batch, 12]``
    without a 3 and a 4."""
    if whole is None or UNKNOWN_DIM in (*whole, *parts):
        return UNKNOWN_DIM
    symbols = Counter(d for d in whole if isinstance(d, str))
    gone = Counter(d for d in parts if isinstance(d, str))
    number, factor = (math.prod(d for d in dims if isinstance(d, int)) for dims in (whole, parts))
    if gone - symbols or not factor or number % factor:
        return UNKNOWN_DIM
    names = [*(symbols - gone).elements()]
    if not names:
        return number // factor
    return names[0] if len(names) == 1 and number == factor else UNKNOWN_DIM
