"""Batches of inputs that a person gives: whether a graph can take them, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ..core.errors import BadInput, near_misses
from ..core.types import Type
from ..core.view import Node, Value, View
from ..core.weights import tensor_bytes
from ..structure.cache_slots import left_out
from ..vocab import traits

Batch = Mapping[str, torch.Tensor]


def as_batches(data: object, what: str) -> list[Batch]:
    """Batches of tensors out of what people have: one batch, several, or what gives them one by one
    (a generator, a ``DataLoader``); arrays of numpy become tensors.

    Raises ``BadInput`` for anything else.
    """
    if isinstance(data, Mapping):
        return [_as_batch(data, what)]
    if isinstance(data, str | torch.Tensor) or not isinstance(data, Iterable):
        raise BadInput(f"{what} is a {type(data).__name__}, and must be a list of {_FORM}")
    return [_as_batch(one, f"{what}, batch {number}") for number, one in enumerate(data, 1)]


_FORM = "batches, each a dict of tensors by the names of the graph's inputs"


def _as_batch(one: object, where: str) -> Batch:
    if not isinstance(one, Mapping):
        raise BadInput(f"{where} is a {type(one).__name__}; data are {_FORM}")
    batch = {str(n): torch.from_numpy(v) if isinstance(v, np.ndarray) else v
             for n, v in one.items()}  # fmt: skip
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor | list | tuple):  # some graphs take sequences
            raise BadInput(f"{where}: {name} is a {type(value).__name__}, and must be a tensor")
    return batch


def check_batches(view: View, batches: Sequence[Batch], what: str = "calibration data") -> None:
    """Whether a canonical graph can take all the batches; ``what`` names them in errors.

    A key-value cache that is left out is empty, as everywhere. Raises ``BadInput`` where there is
    no batch, where names, dtypes or shapes are not those of the graph's inputs, where a number is
    NaN or infinite, and where a token id has no row in the embedding that it picks from.
    """
    if not batches:
        raise BadInput(f"{what}: empty: it holds no batch")
    types = view.input_types()
    rows = table_rows(view)
    for number, batch in enumerate(batches, 1):
        where = f"{what}, batch {number} of {len(batches)}"
        _check_names(where, batch, types)
        sizes: dict[str, int] = {}
        for name, tensor in batch.items():
            _check_tensor(f"{where}: {name}", tensor, types[name], sizes)
        for name, count in rows.items():
            check_ids(f"{where}: {name}", batch[name], count)


def batches_sha256(batches: Sequence[Batch]) -> str:
    """Hash of the names, dtypes, shapes and bytes of all tensors, in order of batches and names."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def count_samples(batches: Sequence[Batch]) -> int:
    """Rows of the first input over all batches."""
    firsts = [next(iter(batch.values())) for batch in batches]
    return sum(int(t.shape[0]) if t.dim() else 1 for t in firsts)


def count_tokens(batches: Sequence[Batch]) -> int | None:
    """Tokens that are not masked out; ``None`` where the batches hold no ``input_ids``."""
    if "input_ids" not in batches[0]:
        return None
    return sum(
        int((b["attention_mask"] != 0).sum()) if "attention_mask" in b else b["input_ids"].numel()
        for b in batches
    )


def _check_names(where: str, batch: Batch, types: Mapping[str, Type]) -> None:
    for name in batch:
        if name not in types:
            known = near_misses(name, types)
            raise BadInput(f"{where}: {name} is not an input of the graph; {known}")
    lacking = [name for name in types if name not in {*batch, *left_out(types, batch)}]
    if lacking:
        raise BadInput(
            f"{where}: {', '.join(lacking)} is missing; the graph takes {', '.join(types)}"
        )


def _check_tensor(where: str, tensor: torch.Tensor, declared: Type, sizes: dict[str, int]) -> None:
    shape = tuple(tensor.shape)
    actual = f"got {Type(tensor.dtype, shape)}"
    if declared.dtype not in (None, tensor.dtype):
        raise BadInput(f"{where}: expected {declared}, {actual}")
    if not tensor.numel():
        raise BadInput(f"{where}: empty: {actual}")
    if declared.shape is not None:
        if len(declared.shape) != len(shape):
            raise BadInput(f"{where}: expected {declared}, {actual}")
        for dim, size in zip(declared.shape, shape, strict=True):
            known = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if known != size and dim != "?":
                same = "" if isinstance(dim, int) else f", with {dim}={known} in this batch"
                raise BadInput(f"{where}: expected {declared}{same}, {actual}")
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise BadInput(f"{where}: {bad} of {tensor.numel()} numbers are NaN or infinite")


def table_rows(view: View) -> dict[str, int]:
    """Rows of the embedding that an input's ids pick from, by the input's name."""
    rows: dict[str, int] = {}
    for name, value in zip(view.input_names(), view.inputs(), strict=True):
        counts = [_rows_behind(view, value, node) for node in view.users(value)]
        known = [count for count in counts if count is not None]
        if known:
            rows[name] = min(known)
    return rows


def _rows_behind(view: View, value: Value, node: Node) -> int | None:
    op, operands = traits(view.op(node)), view.operands(node)
    if op.table is None or op.ids is None or operands[op.ids] is not value:
        return None
    table = view.weight(view.tensor(node, op.table))
    return None if table is None else table.shape[0]


def check_ids(where: str, ids: torch.Tensor, rows: int) -> None:
    """Raise ``BadInput`` where one of the ids, of any shape, is not a row of a table."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        wrong = low if low < 0 else high
        raise BadInput(
            f"{where}: the id {wrong}, and the model knows ids 0 to {rows - 1}: is this another "
            "model's tokenizer?"
        )
