"""One launch of a kernel as a value: what runs it on a device also compiles it without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

OPTIONS = {"enable_fp_fusion": True}
"""Triton 3.10 will not fuse multiply and add unless told to; results are right in both ways."""
ASSUMED_PROCESSORS = 132
"""Multiprocessors of an H100 or H200, where no device can be asked."""


@dataclass(frozen=True)
class Launch:
    """A triton kernel with its grid, its arguments in order, its constants and its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    """Tensors (on the meta device where the launch is only compiled), integers and ``None``."""
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    """Most registers a thread. Left alone, ptxas spills below 100 where it hopes for occupancy."""

    @property
    def options(self) -> dict[str, Any]:
        """What triton is told besides the constants."""
        return {
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers, **OPTIONS
        }  # fmt: skip

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter counts as four."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return ASSUMED_PROCESSORS if device.type == "meta" else 4
