"""Our kernels on a GPU: right, and how fast beside cuBLAS and beside a copy. See ``gpu``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from ...ir.ops import OWN_OPS
from ...ir.ops.linear_bitstack import operand_types as stack_types
from ...ir.ops.linear_nbit import LINEAR_NBIT, operand_types
from ...kernels.registry import Kernel, kernel_of
from .gpu_setting import Row, Setting, replayed

REPEATS = 20
ROWS = (1, 16, 128)
Call = Callable[[], Any]


def milliseconds(work: Call, setting: Setting, repeats: int = REPEATS) -> float:
    """The least time of a call; on a GPU it is replayed from a CUDA graph."""
    if setting.device.type != "cuda":
        begun = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begun)
    return replayed(work, repeats)


# --- right ---------------------------------------------------------------------------------------


def correct(setting: Setting) -> list[Row]:
    """Every kernel on its op's samples against the reference: the worst relative L2 by dtype.

    Raises ``AssertionError``, naming the samples, where one is beyond its op's tolerance.
    """
    rows, wrong = [], []
    for name, op in OWN_OPS.items():
        kernel = kernel_of(name)
        if kernel is None:
            continue
        worst: dict[torch.dtype, float] = {}
        for sample in op.samples():
            if not _taken(kernel, sample.operands, sample.attrs):
                continue
            plain = {**sample.attrs, **({"accuracy_level": 0} if _rounds(sample.attrs) else {})}
            want = op.reference(*sample.operands, **plain).float()
            operands = [None if o is None else o.to(setting.device) for o in sample.operands]
            got = kernel.function(*operands, **plain).float().cpu()
            error = float((got - want).norm() / max(float(want.norm()), 1e-9))
            dtype = next(o.dtype for o in sample.operands if o is not None)
            worst[dtype] = max(worst.get(dtype, 0.0), error)
            if not error <= op.tolerances.get(dtype, 0.0):
                wrong.append(f"{name} {sample.label}: {error:.3g}")
        names = {str(d).removeprefix("torch."): e for d, e in worst.items()}
        rows.append({"kernel": name, **names})
    assert not wrong, "; ".join(wrong)
    return rows


def _rounds(attrs: Mapping[str, Any]) -> bool:
    return bool(attrs.get("accuracy_level") == 4)


def _taken(
    kernel: Kernel, operands: Sequence[torch.Tensor | None], attrs: Mapping[str, Any]
) -> bool:
    first = operands[0]
    assert first is not None
    if kernel.dtypes and first.dtype not in kernel.dtypes:
        return False
    if kernel.ranks and first.dim() not in kernel.ranks:
        return False
    return all(bool(attrs[name] in values) for name, values in kernel.attrs.items())


# --- fast ----------------------------------------------------------------------------------------


def bandwidth(setting: Setting) -> list[Row]:
    """What a copy of 2 GB reads and writes a second, GB."""
    size = 1 << 10 if setting.dry else 1 << 30
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    into = torch.empty_like(source)
    ms = milliseconds(lambda: into.copy_(source), setting)
    return [{"copied bytes": size, "ms": ms, "GB/s": 2 * size / ms / 1e6}]


def kernels(setting: Setting) -> list[Row]:
    """Milliseconds, weight bytes a second as a share of a copy's, and times as fast as cuBLAS."""
    copied = bandwidth(setting)[0]["GB/s"]
    shape = (32, 4) if setting.dry else (4096, 11008)
    rows = []
    for name, size, dense, work in _calls(setting, *shape):
        ms = milliseconds(work, setting)
        row: Row = {"call": name, "ms": ms, "of copy": size / ms / 1e6 / copied}
        if dense is not None:
            row["of cuBLAS"] = milliseconds(dense, setting) / ms
        rows.append(row)
    return rows


def _calls(
    setting: Setting, columns: int, outputs: int
) -> Iterator[tuple[str, int, Call | None, Call]]:
    """Name, bytes that must be read and written, the same by cuBLAS, and the call."""
    make = Drawn(setting)
    weight = make.floats(outputs, columns)
    for rows in (1,) if setting.dry else ROWS:
        x = make.floats(rows, columns)
        dense = _bound(linear, x, weight)
        yield f"cuBLAS, {rows} rows", weight.nbytes, dense, dense
        for bits in (2, 3, 4, 8):
            call, size = make.nbit(x, outputs, bits)
            yield f"linear_nbit {bits} bits, {rows} rows", size, dense, call
        call, size = make.bitstack(x, outputs)
        yield f"linear_bitstack 4 blocks of rank 16, {rows} rows", size, dense, call
    yield from _moves(setting, make)


def _moves(setting: Setting, make: Drawn) -> Iterator[tuple[str, int, Call | None, Call]]:
    from ...kernels.rope import rope
    from ...kernels.token_scores import token_scores
    from ...kernels.token_select import token_select

    tokens, kept, width = (16, 4, 8) if setting.dry else (2880, 290, 4096)
    x = make.floats(1, tokens, width)
    index = torch.arange(kept, device=setting.device)[None]
    yield "token_select", 2 * kept * width * x.itemsize, None, _bound(token_select, x, index)
    q, k = make.floats(1, 4, 1, 8), make.floats(1, 2, tokens, 8)
    if not setting.dry:
        q, k = make.floats(1, 32, 1, 128), make.floats(1, 32, tokens, 128)
    call = _bound(token_scores, q, k, scale=0.1)
    yield f"token_scores, {tokens} keys", k.nbytes, None, call
    table = make.floats(1, 1, tokens, k.shape[3])
    size = 2 * k.nbytes + 2 * table.nbytes
    yield f"rope, {tokens} tokens", size, None, _bound(rope, k, table, table)


def _bound(function: Callable[..., Any], *args: Any, **options: Any) -> Call:
    return lambda: function(*args, **options)


class Drawn:
    """Random operands on the device."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rng = torch.Generator(setting.device).manual_seed(0)

    def floats(self, *shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, device=self._setting.device, generator=self._rng)
        return tensor.to(self._setting.dtype)

    def codes(self, shape: Any) -> torch.Tensor:
        sizes = [int(d) for d in shape]
        return torch.randint(
            256, sizes, dtype=torch.uint8, device=self._setting.device, generator=self._rng
        )

    def nbit(self, x: torch.Tensor, outputs: int, bits: int) -> tuple[Call, int]:
        """A linear of groups of 32 on ``x``; bytes of its weight."""
        columns = x.shape[-1]
        product = self.nbit_linear(columns, outputs, bits)
        stored = operand_types(columns, outputs, bits=bits, group=32)
        return _bound(product, x), LINEAR_NBIT.bytes_read([None, *stored])

    def nbit_linear(
        self, columns: int, outputs: int, bits: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        from ...kernels.linear_nbit import linear_nbit

        codes, scales, _ = operand_types(columns, outputs, bits=bits, group=32)
        stored = self.codes(codes.shape), self.floats(*map(int, scales.shape or ())).half() * 0.01
        return lambda x: linear_nbit(
            x, *stored, bits=bits, group=32, in_features=columns, out_features=outputs
        )

    def bitstack(self, x: torch.Tensor, outputs: int) -> tuple[Call, int]:
        from ...kernels.linear_bitstack import linear_bitstack

        columns = x.shape[-1]
        signs, factors = stack_types(columns, outputs, blocks=4, rank=16)
        stored = self.codes(signs.shape), self.floats(*map(int, factors.shape or ())).half()
        form = {"in_features": columns, "out_features": outputs}
        return _bound(linear_bitstack, x, *stored, **form), sum(t.nbytes for t in stored)
