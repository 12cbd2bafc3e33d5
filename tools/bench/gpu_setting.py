"""Where the parts of ``gpu`` run, and what they give."""

from __future__ import annotations

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
