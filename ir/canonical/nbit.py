"""Linears of few bits, as ONNX models store them, become ``linear_nbit`` again.

MatMulNBits(x, codes, scales, zeros, bias)           => linear_nbit(x, codes, scales, zeros, bias)
MatMulNBits(x, codes, scales, zeros, g_idx)          => linear_nbit(x[..., order], ...)
add(linear_nbit(x, ...), groupsum(x) ((mid - z) s)ᵀ) => linear_nbit(x, ..., z)
add(linear_nbit(x, ...), b)                          => linear_nbit(x, ..., b)

Codes stay the bytes that they are, behind their handles: they are not read, and what is lowered
again has them as they were. Casts, repetitions and widenings are undone where they are the ones
that ``linear_nbit`` itself writes (codes of 2 and 3 bits, scales of float16, one scale a row).

Models of other tools are read in the forms that ``com.microsoft::MatMulNBits`` documents: 2, 4 and
8 bits, blocks of 16 to 256, zero points packed, of floats or absent, each operand flat or in its
rows. With ``g_idx``, the group of each column (GPTQ's act-order), columns are put in the order of
their groups, and the input with them; beside it other widths than 4 bits and packed zero points are
refused: ONNX Runtime's CPU kernel computes something else. ``accuracy_level`` 4 is kept; 1 to 3,
which let a runtime compute in narrower floats, become 0. A ``bias`` operand is written as an
addition when the graph is lowered.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from ..core.errors import BadInput, Refusal
from ..core.view import Node, Operand, Value, View
from ..core.weights import ComputedWeight, MemoryWeight, Weight
from ..onnx.forms import native_node, same_form, stand_in
from ..onnx.view import native_view
from ..ops.linear_nbit import operand_types
from ..ops.matmul_nbits import Form
from ..ops.pack import n_groups, pack, pack_zeros, unpack, zero_bytes
from ..rewrite.driver import RewriteReport, rewrite
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule
from ..vocab.onnx import MICROSOFT
from . import nbit_sums, sparse
from .nbit_sums import OURS, dtype_of, source_of
from .own import own_rules

logger = logging.getLogger(__name__)

NODE = "MatMulNBits"


def canonicalize_stored(view: View, *, step: int = 0) -> RewriteReport:
    """Read every ``MatMulNBits`` of an ONNX graph, its side path of outliers, and what other ops of
    ours declare decoders for, in place.

    This comes before constants are folded, which would write out what is stored in fewer bytes.
    Nodes in a form that is not read stay as they are; a warning says why.
    """
    if view.kind != "onnx":
        return RewriteReport()
    native, rules = f"{MICROSOFT}::{NODE}", own_rules()
    if any(view.native_op(node) == native for node in view.nodes()):
        rules = (FuseMatMulNBits, *nbit_sums.RULES, *sparse.RULES, *rules)
    if not rules:
        return RewriteReport()
    report = rewrite(view, [rule() for rule in rules], step=step)
    refusal = report.refusals.get(FuseMatMulNBits.name)
    remaining = [view.name(node) for node in view.nodes() if view.native_op(node) == native]
    if remaining and refusal is not None:
        count, first = len(remaining), remaining[0]
        logger.warning("%d %s stay as they are (%s): %s", count, NODE, first, refusal.reason)
    return report


class FuseMatMulNBits(Rule):
    """MatMulNBits(x, codes, scales, zeros, bias) => linear_nbit(x, codes, scales, zeros, bias)"""

    name = "fuse-matmul-nbits"

    def pattern(self, p: Any, x: Any, codes: Any, scales: Any) -> Any:
        return p.native(f"{MICROSOFT}::{NODE}", x, codes, scales, rest=True)

    def where(self, match: Match) -> None:
        _Reader(match.view, match.root).stored()

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, root = build.view, build.match.root
        stored = _Reader(view, root).stored()
        parts = (stored.codes, stored.scales, stored.zeros, stored.bias)
        x = bound["x"]
        if stored.order is not None:
            order = view.add_weight(f"{view.name(root)}.order", MemoryWeight(stored.order))
            x = build.index_select(x, order, dim=-1)
        operands = [x, *(None if part is None else Value(part) for part in parts)]
        while operands[-1] is None:
            operands.pop()
        name = OURS.sub("", view.name(root)) or None
        return build.linear_nbit(*operands, name=name, **stored.attrs)


@dataclass(frozen=True)
class _Stored:
    """What a ``MatMulNBits`` multiplies by, as ``linear_nbit`` takes it."""

    codes: onnx_ir.Value
    scales: onnx_ir.Value
    zeros: onnx_ir.Value | None
    bias: onnx_ir.Value | None
    attrs: dict[str, int]
    order: Tensor | None = None
    """Columns in the order of their groups, where that is another."""


class _Reader:
    """Reads the operands of one node. Every method raises ``Refusal`` where it cannot."""

    def __init__(self, view: View, node: Node) -> None:
        self.view, self.node = native_view(view), node
        x, codes, scales, *rest = native_node(node).inputs
        if x is None or codes is None or scales is None:
            raise Refusal("its input, its codes or its scales are absent", node)
        self.x, self.codes, self.scales = x, codes, scales
        self.zeros, self.index, self.bias = (*rest, None, None, None)[:3]
        attrs = view.attrs(node)
        self.bits, self.block = int(attrs.get("bits", 4)), int(attrs.get("block_size", 0))
        self.attrs = {
            "bits": self.bits, "group": self.block, "in_features": int(attrs.get("K", 0)),
            "out_features": int(attrs.get("N", 0)),
            "accuracy_level": 4 if attrs.get("accuracy_level") == 4 else 0,
        }  # fmt: skip
        self.prepacked = bool(attrs.get("weight_prepacked", 0))

    def refuse(self, reason: str) -> Refusal:
        return Refusal(reason, self.node)

    def stored(self) -> _Stored:
        if self.prepacked:
            raise self.refuse("its codes are packed for one kind of GPU (weight_prepacked)")
        if min(self.block, self.attrs["in_features"], self.attrs["out_features"]) < 1:
            raise self.refuse("K, N and block_size must be given, each 1 or more")
        if self.bits not in (2, 4, 8):
            raise self.refuse(f"bits={self.bits}: 2, 4 and 8 are read")
        bias = self.bias
        if bias is not None and self.view.weight(bias) is None:
            raise self.refuse("its bias is not a constant")
        order = None if self.index is None else self._order(self.index)
        codes = self._codes()
        scales = self._scales()
        if order is not None:
            codes = self._ordered(codes, order)
        return _Stored(codes, scales, self._zeros(), bias, self.attrs, order)

    def _order(self, value: onnx_ir.Value) -> Tensor | None:
        handle, columns = self.view.weight(value), self.attrs["in_features"]
        zeros = None if self.zeros is None else dtype_of(self.zeros)
        if self.bits != 4 or (zeros is not None and not zeros.is_floating_point()):
            raise self.refuse(
                "it has g_idx, which is read of 4 bits without packed zero points, as ONNX "
                "Runtime's CPU kernel takes it; export the model again with its columns in the "
                "order of their groups"
            )
        if handle is None or handle.numel != columns:
            raise self.refuse("its g_idx is no constant with the group of each column")
        index = handle.read().long().flatten()
        order, ascending = torch.sort(index, stable=True).indices, torch.arange(columns)
        if not torch.equal(index[order], ascending // self.block):
            raise self.refuse(f"its g_idx makes groups that are not of {self.block} columns each")
        return None if torch.equal(order, ascending) else order

    def _ordered(self, codes: onnx_ir.Value, order: Tensor) -> onnx_ir.Value:
        handle, bits, group = self.view.weight(codes), self.attrs["bits"], self.attrs["group"]
        assert handle is not None

        def make() -> Tensor:
            apart = unpack(handle.read(), bits, group, len(order))
            return pack(apart[:, order], bits, group)

        key = ("in the order of their groups", handle.key)
        stored = ComputedWeight(make, handle.shape, handle.dtype, key)
        return self.view.add_weight(self.view.name(codes), stored)

    def _codes(self) -> onnx_ir.Value:
        if self.view.weight(self.codes) is not None:
            return self._rows(self.codes, 0, "codes")
        source = source_of(self.codes)
        leaf = stand_in(source)
        for bits in (2, 3) if self.view.weight(source) is not None else ():
            self.attrs["bits"] = bits
            if same_form(self.codes, self._form().codes(leaf), {leaf: source}):
                return source
        raise self.refuse("its codes are computed")

    def _scales(self) -> onnx_ir.Value:
        if self.view.weight(self.scales) is not None:
            return self._rows(self.scales, 1, "scales")
        source = source_of(self.scales)
        leaf, work = stand_in(source), dtype_of(self.scales) or self.x.dtype
        if self.view.weight(source) is None or not work:
            raise self.refuse("its scales are computed")
        for group in (self.block, 0):
            form = self._form(group)
            wide = form.cast(leaf, work)
            if form.block == self.block and same_form(
                self.scales, form.scales(wide), {leaf: source}
            ):
                self.attrs["group"] = group
                return source
        raise self.refuse("its scales are computed")

    def _zeros(self) -> onnx_ir.Value | None:
        if self.zeros is None:
            return None
        handle = self.view.weight(self.zeros)
        if handle is not None:
            real = handle.dtype.is_floating_point
            if self.bits == 2 and not real:
                return self._quarters(self.zeros, handle)
            return self._rows(self.zeros, 2, "zero points", real=real)
        source = source_of(self.zeros)
        leaf, form = stand_in(source), self._form()
        if same_form(self.zeros, form.zeros(None), {}):
            return None
        if same_form(self.zeros, form.zeros(leaf), {leaf: source}):
            return source
        raise self.refuse("its zero points are computed")

    def _quarters(self, value: onnx_ir.Value, handle: Weight) -> onnx_ir.Value:
        """Zero points of 2 bits lie four a byte in the node, and two a byte in ``linear_nbit``."""
        rows = self.attrs["out_features"]
        groups = n_groups(self.block, self.attrs["in_features"])
        if handle.numel != rows * -(-groups // 4):
            raise self.refuse(f"its zero points are {list(handle.shape)}")

        def make() -> Tensor:
            apart = [handle.read().reshape(rows, -1) >> shift & 3 for shift in (0, 2, 4, 6)]
            return pack_zeros(torch.stack(apart, -1).flatten(1)[:, :groups].contiguous(), 2)

        shape = (rows, zero_bytes(2, groups))
        stored = ComputedWeight(make, shape, torch.uint8, ("two a byte", handle.key))
        return self.view.add_weight(self.view.name(value), stored)

    def _form(self, group: int | None = None) -> Form:
        attrs = self.attrs if group is None else {**self.attrs, "group": group}
        return Form(Tape(), {**attrs, "accuracy_level": 0})

    def _rows(
        self, value: onnx_ir.Value, index: int, what: str, *, real: bool = False
    ) -> onnx_ir.Value:
        """A constant operand in rows; models of earlier runtimes have them one behind another."""
        handle = self.view.weight(value)
        assert handle is not None
        fan_in, fan_out = self.attrs["in_features"], self.attrs["out_features"]
        try:
            types = operand_types(
                fan_in, fan_out, bits=self.attrs["bits"], group=self.attrs["group"],
                zeros="real" if real else "integer",
            )  # fmt: skip
        except BadInput as error:
            raise self.refuse(str(error)) from None
        declared = types[index]
        assert declared is not None and declared.shape is not None
        shape = tuple(int(size) for size in declared.shape)
        if handle.shape == shape:
            return value
        if handle.numel != declared.numel:
            raise self.refuse(f"its {what} are {list(handle.shape)}, expected {list(shape)}")
        return self.view.add_weight(self.view.name(value), handle.reshaped(shape))
