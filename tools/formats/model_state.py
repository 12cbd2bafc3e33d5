"""An artifact as the parameters of the model that it was made of: linears as they are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput
from ...ir.core.view import Node, Value, View, is_value
from ...ir.core.weights import CastWeight, Weight
from ...ir.load.hf.match import listed
from ...ir.load.hf.model import build, read_config
from ...ir.load.side_files import read_json
from ...ir.load.sources import load
from ...ir.ops.nbit_weight import NBitForm, NBitWeight
from ...ir.ops.pack import n_groups, unpack, unpack_zeros
from ...ir.structure.recognize import Embedding, Linear, recognize
from .norm_weights import norm_weights, parameter_of


@dataclass(frozen=True)
class PackedLinear:
    """A linear in few bits, ``[rows, columns]``."""

    name: str
    rows: int
    columns: int
    bits: int
    group: int
    """Columns that share a scale; 0 for a whole row."""
    stored: tuple[Weight, Weight, Weight | None]
    """Codes, scales and zero points in the layout of ``ir.ops.pack``."""

    @property
    def groups(self) -> int:
        return n_groups(self.group, self.columns)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return self.stored[2] is None

    @property
    def real_zeros(self) -> bool:
        return self.stored[2] is not None and self.stored[2].dtype.is_floating_point

    def weight(self) -> NBitWeight:
        """The matrix."""
        return NBitWeight(NBitForm(self.bits, self.group, *self.stored), (self.rows, self.columns))

    def codes(self) -> Tensor:
        """uint8 ``[rows, columns]``."""
        return unpack(self.stored[0].read(), self.bits, self.group, self.columns).contiguous()

    def scales(self) -> Tensor:
        """``[rows, groups]``."""
        return self.stored[1].read()

    def zeros(self) -> Tensor:
        """Whole zero points, uint8 ``[rows, groups]``."""
        stored = self.stored[2]
        if stored is None:
            return torch.full((self.rows, self.groups), 1 << (self.bits - 1), dtype=torch.uint8)
        return unpack_zeros(stored.read(), self.bits, self.groups).contiguous()


@dataclass(frozen=True)
class LowRank:
    """A low-rank path beside a linear: ``x @ down.T @ up.T``, ``[r, in]`` and ``[out, r]``."""

    name: str
    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class ModelState:
    """Every parameter of the model: packed, or whole."""

    folder: Path
    config: Mapping[str, Any]
    packed: Mapping[str, PackedLinear]
    """By the name of the linear's module."""
    whole: Mapping[str, Weight]
    """By the parameter's name."""
    tables: Mapping[str, PackedLinear]
    """Of ``whole``, those that are stored in few bits, as they are stored."""
    paths: Mapping[str, LowRank]
    """By the name of the linear beside which they are."""
    stacked: frozenset[str] = frozenset()
    """Parameters that are a linear each, an expert of a stack: by their names above, a row for each
    output, whichever way the model has them."""

    def dtype(self) -> torch.dtype:
        named = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return getattr(torch, str(named), torch.float32)


def read_state(artifact: Path) -> ModelState:
    """The parameters of an artifact made of a Hugging Face folder.

    Raises ``BadInput`` where the graph is not that model any more (blocks or tokens left out), or
    holds a linear in a form that no such file has, and ``Missing`` without its ``config.json``.
    """
    config = read_config(artifact, trust_remote_code=False)
    model = build(artifact, config, None)
    view = load(artifact)
    decoded = any(view.native_op(node) == "DequantizeLinear" for node in view.nodes())
    canonicalize(view)
    structure = recognize(view)
    sites = {site.name: site for site in structure.linears}
    tables = {table.name: table for table in structure.embeddings}
    named = {view.name(value): value for value in _constants(view)}
    norms = norm_weights(view)
    packed: dict[str, PackedLinear] = {}
    whole: dict[str, Weight] = {}
    few_bits: dict[str, PackedLinear] = {}
    lacking, stacked = [], set()
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if name in sites and _EXPERT.search(name):
            stacked.add(name)
            linear = _linear(view, sites[name])
            if isinstance(linear, PackedLinear):
                packed[name] = linear
            elif linear is not None:
                whole[name] = linear
            continue
        stored = _site_weight(view, kind, sites.get(module), tables.get(module)) or _named(
            view, named, name, tuple(parameter.shape)
        )
        if stored is None and kind == "weight" and module in norms:
            stored = parameter_of(model.get_submodule(module), norms[module])
        if isinstance(stored, PackedLinear) and not _is_linear(model.get_submodule(module)):
            stored = stored.weight()  # of a router, say, which no library looks for codes of
        if isinstance(stored, PackedLinear):
            packed[module] = stored
        elif stored is not None and stored.shape == tuple(parameter.shape):
            whole[name] = stored
            if isinstance(stored, NBitWeight):
                few_bits[name] = _packed(module, stored)
        else:
            lacking.append(name)
    if lacking:
        why = (
            "Passes that leave out blocks or change the model's shape give a graph that only ONNX "
            "holds"
        )
        if decoded and all(map(_EXPERT.search, lacking)):
            why = (
                "Behind DequantizeLinear experts of a stack lose their names: write the artifact "
                "with --target cpu, and convert that"
            )
        raise BadInput(
            f"{artifact}: {len(lacking)} parameters of the model that config.json describes are "
            f"not in the artifact: {listed(lacking)}. {why}"
        )
    paths = {name: path for name, site in sites.items() if (path := _path(view, site)) is not None}
    return ModelState(
        artifact, read_json(artifact, "config.json"), packed, whole, few_bits, paths,
        frozenset(stacked),
    )  # fmt: skip


def _named(
    view: View, named: Mapping[str, Value], name: str, shape: tuple[int, ...]
) -> Weight | None:
    """A constant by the parameter's name; of a vector also one that has been given further sizes of
    1, whose name has a number behind it."""
    if name in named:
        return view.weight(named[name])
    again = re.compile(re.escape(name) + r"_\d+")
    for other, value in named.items() if len(shape) == 1 else ():
        weight = view.weight(value)
        if weight is None or not again.fullmatch(other):
            continue
        if tuple(size for size in weight.shape if size != 1) == tuple(n for n in shape if n != 1):
            return weight.reshaped(shape)
    return None


_EXPERT = re.compile(r"\.experts\.\d+\.")


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _site_weight(
    view: View, kind: str, site: Linear | None, table: Embedding | None
) -> PackedLinear | Weight | None:
    """What the graph has for a parameter of a linear or a table."""
    if site is not None and kind == "bias":
        return None if site.bias is None else view.weight(site.bias)
    if site is not None and kind == "weight":
        return _linear(view, site)
    if table is not None and kind == "weight":
        return _table(view, table)
    return None


def _linear(view: View, site: Linear) -> PackedLinear | Weight | None:
    op = view.op(site.node)
    if op == "linear":
        return view.weight(site.weight)
    if op != "linear_nbit":
        raise BadInput(f"{site.name} is stored as {op}, which only the ONNX artifact holds")
    attrs, (codes, scales, zeros) = view.attrs(site.node), _operands(view, site.node)
    assert codes is not None and scales is not None
    # One group that is the row lies as a row does, and is called so.
    group = 0 if attrs["group"] == site.in_features else attrs["group"]
    return PackedLinear(
        site.name, site.out_features, site.in_features, attrs["bits"], group,
        (codes, narrowed(scales), zeros),
    )  # fmt: skip


def narrowed(weight: Weight, dtype: torch.dtype = torch.float16) -> Weight:
    """The weight in a narrower dtype where that holds its numbers, which an artifact may hold in a
    wider one for its runtime; else as it is."""
    if weight.dtype == dtype:
        return weight
    wide = weight.read()
    return CastWeight(weight, dtype) if torch.equal(wide.to(dtype).to(wide.dtype), wide) else weight


def _operands(view: View, node: Node) -> tuple[Weight | None, Weight | None, Weight | None]:
    weights = [view.weight(v) if is_value(v) else None for v in view.operands(node)[1:4]]
    first, second, third = (*weights, None, None, None)[:3]
    return first, second, third


def _table(view: View, table: Embedding) -> Weight | None:
    """The table; one that is stored in few bits as the numbers that it stands for."""
    if view.op(table.node) == "embedding":
        return view.weight(table.weight)
    if view.op(table.node) != "embedding_nbit":
        raise BadInput(f"{table.name} is stored as {view.op(table.node)}, which is not written")
    attrs, (codes, scales, zeros) = view.attrs(table.node), _operands(view, table.node)
    assert codes is not None and scales is not None
    form = NBitForm(attrs["bits"], attrs["group"], codes, scales, zeros)
    return NBitWeight(form, (table.rows, table.width))


def _packed(name: str, table: NBitWeight) -> PackedLinear:
    form, (rows, columns) = table.form, table.shape
    stored = (form.codes, narrowed(form.scales), form.zeros)
    return PackedLinear(name, rows, columns, form.bits, form.group, stored)


def _constants(view: View) -> Iterator[Value]:
    for node in view.nodes():
        for operand in view.operands(node):
            if is_value(operand) and view.weight(operand) is not None:
                yield operand


# --- low-rank paths ------------------------------------------------------------------------------


def _path(view: View, site: Linear) -> LowRank | None:
    """The path that is added to a linear; refused where something else is."""
    users = view.users(site.out)
    if len(users) != 1 or view.op(users[0]) != "add":
        return None
    others = [o for o in view.operands(users[0]) if is_value(o) and o is not site.out]
    side = view.producer(others[0]) if len(others) == 1 else None
    if side is not None and view.op(side) == "sparse_linear":
        raise BadInput(f"{site.name} has outliers beside it, which only the ONNX artifact holds")
    if side is None or view.op(side) != "linear":
        return None
    up, inner = _dense(view, side), view.producer(view.tensor(side))
    cut = None
    if inner is not None and view.op(inner) == "slice":
        cut, inner = inner, view.producer(view.tensor(inner))
    if up is None or inner is None or view.op(inner) != "linear" or view.tensor(inner) != site.x:
        return None
    down = _dense(view, inner)
    if down is None:
        return None
    if cut is not None:
        start = next(o for o in view.operands(cut)[1:] if isinstance(o, int))
        down = down[start : start + up.shape[1]]
    return LowRank(site.name, down, up)


def _dense(view: View, node: Node) -> Tensor | None:
    """The constant weight of a linear, through a cast."""
    value = view.tensor(node, 1)
    maker = view.producer(value)
    if maker is not None and view.op(maker) == "cast":
        value = view.tensor(maker)
    handle = view.weight(value)
    return None if handle is None else handle.read()
