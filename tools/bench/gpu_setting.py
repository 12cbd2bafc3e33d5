"""Where the parts of ``gpu`` run, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
"""One line of a part's table: names to numbers and words."""


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and whether at sizes that mean nothing."""

    device: torch.device
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        """bf16; on a CPU float32, in which the interpreter is exact."""
        return torch.float32 if self.dry else torch.bfloat16


def replayed(work: Callable[[], object], repeats: int) -> float:
    """The least milliseconds of a call on a CUDA device, replayed from a CUDA graph."""
    cuda: Any = torch.cuda  # partly untyped
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(3):
            work()
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)
