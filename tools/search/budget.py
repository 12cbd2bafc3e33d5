"""What a person asks for: bounds on bytes, time, key-value cache or loss, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...ir.core.errors import BadInput, near_misses

MEASURES = ("bytes", "ms", "kv", "loss")
"""What may be bounded. The goal is the loss, or, where that is bounded and they are not, bytes."""
Axis = Literal["bytes", "ms", "kv"]
AXES: tuple[Axis, ...] = ("bytes", "ms", "kv")
"""What recipes cost."""
FORMS = {
    "bytes": "25% of the source's weights, or 300MB",
    "ms": "0.5x of the source's time, or 12",
    "kv": "40% of the source's key-value cache, or 20MB",
    "loss": "1%, or 0.01",
}
_UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}


@dataclass(frozen=True)
class Bound:
    """One bound as it was written: a share of the source's, or a number."""

    measure: str
    number: float
    share: bool

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Raises ``BadInput`` for a measure that is not known and a number that is none."""
        measure, equals, written = (part.strip() for part in text.partition("="))
        if measure not in MEASURES:
            raise BadInput(f"budget {text!r}: {near_misses(measure, MEASURES)}, as in bytes=25%")
        number, share = _number(measure, written) if equals else (math.nan, False)
        if not (number > 0 and math.isfinite(number)):
            raise BadInput(f"budget {text!r}: expected a number above 0: {FORMS[measure]}")
        return cls(measure, number, share)

    def limit(self, source: Mapping[str, float]) -> float:
        """The bound as a number, of a source that costs so much."""
        return self.number * source[self.measure] if self.share else self.number

    def __str__(self) -> str:
        if self.measure == "ms":
            return f"ms={self.number:g}{'x' if self.share else ''}"
        if self.share or self.measure == "loss":
            return f"{self.measure}={100 * self.number:g}%"
        mega = self.number / 1e6
        amount = f"{mega:g}MB" if float(f"{mega:g}") == mega else f"{self.number:.0f}"
        return f"{self.measure}={amount}"


def _number(measure: str, text: str) -> tuple[float, bool]:
    """A number and whether it is a share of the source's; NaN where the text is no number."""
    upper = text.upper()
    if upper.endswith("%"):
        return _float(text[:-1]) / 100, measure != "loss"
    if measure == "ms" and upper.endswith("X"):
        return _float(text[:-1]), True
    if measure in ("bytes", "kv"):
        unit = max((u for u in _UNITS if upper.endswith(u)), key=len, default="")
        return _float(upper.removesuffix(unit)) * _UNITS.get(unit, 1.0), False
    return _float(text), False


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Budget:
    """All bounds that hold at once. ``str`` gives the text that ``parse`` takes."""

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``bytes=25%``, ``bytes=300MB,loss=1%``. Raises ``BadInput``, also for two bounds on one
        measure."""
        bounds = tuple(Bound.parse(part) for part in text.split(",") if part.strip())
        if not bounds:
            raise BadInput(f"the budget is empty: give one such as bytes=25% ({_listed()})")
        names = [bound.measure for bound in bounds]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BadInput(f"budget {text!r}: {twice} is bounded twice; give one bound")
        return cls(bounds)

    def limits(self, source: Mapping[str, float]) -> dict[str, float]:
        """The bounds as numbers by measure. Raises ``BadInput`` for a measure that the source does
        not have."""
        for bound in self.bounds:
            if bound.measure not in source:
                raise BadInput(f"budget {bound}: {_LACKING[bound.measure]}")
        return {bound.measure: bound.limit(source) for bound in self.bounds}

    def limit_of(self, measure: str, source: Mapping[str, float]) -> float | None:
        """The bound on one measure; ``None`` without one, or where the source has none of it."""
        limits = [b.limit(source) for b in self.bounds if b.measure == measure in source]
        return limits[0] if limits else None

    @property
    def goal(self) -> str:
        """What is made as small as the bounds allow."""
        return "bytes" if "loss" in self.bounded and "bytes" not in self.bounded else "loss"

    @property
    def axis(self) -> Axis:
        """What a front is drawn along: of what recipes cost, that which is bounded first, or bytes.
        """
        names = [bound.measure for bound in self.bounds]
        return min((axis for axis in AXES if axis in names), key=names.index, default="bytes")

    @property
    def bounded(self) -> set[str]:
        """The measures that are."""
        return {bound.measure for bound in self.bounds}

    def __str__(self) -> str:
        return ",".join(map(str, self.bounds))


_LACKING = {
    "bytes": "the model holds no weights",
    "ms": "nothing counts the time of this model",
    "kv": "the model keeps no keys and values: there is nothing to bound",
    "loss": "the model returns no numbers",
}


def _listed() -> str:
    return "; ".join(f"{name}: {form}" for name, form in FORMS.items())
