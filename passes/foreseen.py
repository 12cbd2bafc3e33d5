"""What passes can tell of a linear by itself: what they should cost there, and what they do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..ir.run.statistics import Statistics
from ..ir.structure.recognize import Linear


class Foreseen(ABC):
    """Mixed into passes whose error at a linear has a formula.

    The error that counts is that of the outputs, ``tr(D S D^T)`` of the gap ``D`` that the pass
    makes and the Gram matrix S of the inputs. Statistics are those that the pass asks for, and
    ``Gram``.
    """

    @abstractmethod
    def expected_loss(self, linear: Linear, weight: Tensor, statistics: Statistics) -> float:
        """``tr(D S D^T)`` by the formula, of a linear's weight f32 ``[out, in]``: nothing is
        rounded and nothing is learned."""

    @abstractmethod
    def stand_in(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Tensor:
        """The matrix f32 ``[out, in]`` that the pass lets stand for a linear's weight."""
