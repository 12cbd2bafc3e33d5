"""``python -m graphwright.tools.bench.kernels``: our kernels on a GPU, beside cuBLAS in bfloat16.

16 linears of 2048x5632, whose int4 weights (104 MB) fit no cache, run one after the other from a
CUDA graph, so that launches cost nothing. With ``--offline`` nothing runs: the kernels are compiled
for sm_80, sm_90 and sm_100, and what ptxas made of them is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ...ir.core.errors import BoundExceeded, GraphwrightError, Missing
from ...ir.core.types import Type
from ...ir.ops.linear_nbit import LINEAR_NBIT, operand_types
from ...ir.vocab import ops_with
from ...kernels import offline as compiler
from ...kernels.launch import Launch
from ...kernels.registry import kernel_of
from .gpu_setting import replayed

linear = torch.nn.functional.linear

OUTPUTS, COLUMNS, LINEARS, GROUP = 5632, 2048, 16, 32
ROWS = (1, 16, 128)
RANK = 32
REPEATS = 20


# --- without a device ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one kind of device."""

    arch: str
    kernel: str
    case: str
    registers: int
    spilled: int
    shared: int
    shared_limit: int


def offline(capabilities: Sequence[int] = (80, 90, 100), quick: bool = False) -> list[Row]:
    """Compile every case for every capability; with ``quick`` all for 90 alone, and of each kernel
    the first for the others. Raises ``Missing`` without triton or its ptxas."""
    if os.environ.get("TRITON_INTERPRET"):
        raise Missing("TRITON_INTERPRET is set, nothing is compiled under it: unset it")
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton is not installed: pip install triton (Linux, x86-64)")
    rows = []
    for capability in capabilities:
        for case, launch in _first() if quick and capability != 90 else _launches():
            figures = compiler.compile_for(launch, capability)
            limit = compiler.SHARED_LIMITS[capability]
            name = launch.kernel.__name__
            numbers = (figures.registers, figures.spilled, figures.shared, limit)
            rows.append(Row(f"sm_{capability}", name, case, *numbers))
    return rows


def _launches() -> list[tuple[str, Launch]]:
    kernels = (kernel_of(name) for name in ops_with(lambda op: op.own))
    return [launch for kernel in kernels if kernel is not None for launch in kernel.launches()]


def _first() -> list[tuple[str, Launch]]:
    """The first launch of each kernel."""
    return list({launch.kernel: (case, launch) for case, launch in reversed(_launches())}.values())


def _shape(operand: Type) -> list[int]:
    return [int(size) for size in operand.shape or ()]


def offline_table(rows: Sequence[Row]) -> Table:
    """Registers, spills and shared memory, a line a kernel and case."""
    table = Table(title="compiled without a device; spills in bytes a thread, shared in KiB")
    for name in ("arch", "kernel", "case"):
        table.add_column(name)
    for name in ("registers", "spills", "shared", "limit"):
        table.add_column(name, justify="right")
    for row in rows:
        shared = (f"{row.shared / 1024:.1f}", f"{row.shared_limit / 1024:.0f}")
        table.add_row(row.arch, row.kernel, row.case, str(row.registers), str(row.spilled), *shared)
    return table


# --- on a device ---------------------------------------------------------------------------------

Form = Callable[[torch.Tensor, int], torch.Tensor]
"""One of the 16 linears on ``x``."""


class _Weights:
    """16 random linears, group 32, with a low-rank path that they share."""

    def __init__(self) -> None:
        self._rng = torch.Generator("cuda").manual_seed(0)
        self.stored = {bits: [self._drawn(bits) for _ in range(LINEARS)] for bits in (4, 8)}
        self.dense = [self._normal(OUTPUTS, COLUMNS).bfloat16() for _ in range(LINEARS)]
        self.down = (self._normal(RANK, COLUMNS) * 0.02).bfloat16()
        self.up = (self._normal(OUTPUTS, RANK) * 0.02).half()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=self._rng)

    def _drawn(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales."""
        codes, scales = map(_shape, operand_types(COLUMNS, OUTPUTS, bits=bits, group=GROUP)[:2])
        drawn = torch.randint(256, codes, dtype=torch.uint8, device="cuda", generator=self._rng)
        return drawn, (self._normal(*scales).abs() * 0.01 + 0.002).half()

    def nbytes(self, bits: int, rank: int = 0) -> int:
        """Bytes of the 16 weights; factors are counted once a linear."""
        stored = operand_types(COLUMNS, OUTPUTS, bits=bits, group=GROUP)
        one = LINEAR_NBIT.bytes_read([None, *stored])
        return LINEARS * (one + 2 * rank * (COLUMNS + OUTPUTS))

    def plain(self, bits: int) -> Form:
        from ...kernels.linear_nbit import linear_nbit

        return lambda x, i: linear_nbit(
            x, *self.stored[bits][i],
            bits=bits, group=GROUP, in_features=COLUMNS, out_features=OUTPUTS,
        )  # fmt: skip

    def fused(self, x: torch.Tensor, i: int) -> torch.Tensor:
        from ...kernels.linear_nbit import linear_nbit_low_rank

        return linear_nbit_low_rank(
            x, *self.stored[4][i], None, None, linear(x, self.down), self.up,
            bits=4, group=GROUP, in_features=COLUMNS, out_features=OUTPUTS,
        )  # fmt: skip

    def apart(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return self.plain(4)(x, i) + linear(linear(x, self.down), self.up.to(x.dtype))

    def forms(self) -> list[tuple[str, int, int, Form]]:
        """Name, bits, bytes of the weights, and how one linear is computed."""
        with_path = self.nbytes(4, RANK)
        return [
            ("8 bits group 32", 8, self.nbytes(8), self.plain(8)),
            ("4 bits group 32", 4, self.nbytes(4), self.plain(4)),
            (f"4 bits, rank {RANK} fused", 4, with_path, self.fused),
            (f"4 bits, rank {RANK} apart", 4, with_path, self.apart),
        ]

    def check(self, rows: int) -> None:
        """Compare the kernels with the reference. Raises ``BoundExceeded`` where they are off."""
        x = self._normal(rows, COLUMNS).bfloat16()
        side = linear(linear(x.float(), self.down.float()), self.up.float())
        for name, bits, _, form in self.forms():
            want = LINEAR_NBIT.reference(
                x, *self.stored[bits][0],
                bits=bits, group=GROUP, in_features=COLUMNS, out_features=OUTPUTS,
            ).float()  # fmt: skip
            want = want + side if "rank" in name else want
            error = float((form(x, 0).float() - want).norm() / want.norm())
            if not error <= LINEAR_NBIT.tolerances[torch.bfloat16]:
                raise BoundExceeded(f"{name} at {rows} rows is {error:.3g} from the reference")


def measure(form: Form, rows: int) -> float:
    """Least milliseconds of all 16 linears, replayed from a CUDA graph."""
    x = torch.randn(rows, COLUMNS, device="cuda").bfloat16()

    def work() -> None:
        for i in range(LINEARS):
            form(x, i)

    return replayed(work, REPEATS)


def bench() -> Table:
    """Check, then time all forms at 1, 16 and 128 rows. Raises ``Missing`` without a device."""
    if not torch.cuda.is_available():
        raise Missing(
            "no CUDA device: the kernels cannot be timed. --offline compiles them and prints "
            "registers, spills and shared memory"
        )
    weights = _Weights()
    table = Table(
        title=f"{LINEARS} linears of {COLUMNS}x{OUTPUTS} on {torch.cuda.get_device_name()}: "
        "ms (times as fast as cuBLAS bf16; GB/s of weights)"
    )
    table.add_column("form")
    for rows in ROWS:
        weights.check(rows)
        table.add_column(f"{rows} rows", justify="right")
    dense = 2 * LINEARS * OUTPUTS * COLUMNS
    forms = [("cuBLAS bf16", 16, dense, lambda x, i: linear(x, weights.dense[i])), *weights.forms()]
    base: list[float] = []
    for name, _, size, form in forms:
        times = [measure(form, rows) for rows in ROWS]
        base = base or times
        table.add_row(name, *(
            f"{ms:.3f} ({first / ms:.2f}x; {size / ms / 1e6:.0f})"
            for ms, first in zip(times, base, strict=True)
        ))  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 0, or the exit code of what went wrong (3 without a device)."""
    parser = argparse.ArgumentParser(prog="python -m graphwright.tools.bench.kernels")
    parser.add_argument("--offline", action="store_true", help="Compile only, for sm_80 to sm_100.")
    parser.add_argument("--quick", action="store_true", help="Offline, all cases for sm_90 alone.")
    parser.add_argument("--json", action="store_true", help="The offline figures as JSON.")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if not options.offline:
            console.print(bench())
            return 0
        rows = offline(quick=options.quick)
    except GraphwrightError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in rows]) + "\n")
    else:
        console.print(offline_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
