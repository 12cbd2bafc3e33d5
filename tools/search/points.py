"""What a search measures and gives: points, and the one that keeps its budget best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...passes.recipe import Recipe
from .budget import Budget
from .judge import Judge, Loss
from .menu import Menu
from .problem import Choice


@dataclass(frozen=True)
class Point:
    """One recipe: what it is forecast to cost, and what was measured."""

    choice: Choice
    recipe: Recipe
    costs: Mapping[str, float]
    """By measure. ``loss`` as a share, corrected by what was measured so far."""
    measured: Loss | None = None


@dataclass
class Found:
    """What a search found. ``recipe`` is what ``optimize`` takes."""

    recipe: Recipe
    best: Point
    budget: Budget
    limits: Mapping[str, float]
    source: Mapping[str, float]
    front: list[Point]
    """Along the budget's axis; measured ones and forecast ones."""
    factors: Mapping[str, float]
    """By which forecasts of each kind were corrected."""
    menu: Menu
    judge: Judge
    notes: list[str] = field(default_factory=list)
