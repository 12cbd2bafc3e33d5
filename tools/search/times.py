"""What runs of a model take, by what its linears hold: a table that adds up over the graph."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath

from ...ir.core.errors import BadInput
from ...ir.structure.recognize import Linear
from .forms import PATHS, Form, Path

MAKE = "optimize-model bench MODEL --times FILE measures one"


def signature(linear: Linear) -> str:
    """Equal for linears of one size, which take equally long."""
    return f"{linear.in_features}x{linear.out_features}"


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run on some inputs, and what each change adds to them or takes away."""

    whole: float
    """Of the source."""
    linears: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By ``signature``, what one linear adds: by ``Form.timed``, and by path beside 4 bits."""
    halves: Mapping[str, float] = field(default_factory=dict)
    """What one half of a block takes, by its part: ``attn``, ``mlp``, or nothing for a whole."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What one place saves of which a share of the heads or units is gone, by its signature and the
    share."""
    tables: Mapping[str, float] = field(default_factory=dict)
    """What tables of embeddings add, and heads that are tied to them, by what they hold."""
    cuts: Mapping[str, float] = field(default_factory=dict)
    """Of the source behind each way to drop image tokens."""
    caches: Mapping[str, float] = field(default_factory=dict)
    """What a cache of few bits adds, by how it is kept."""
    inputs: Mapping[str, list[int]] = field(default_factory=dict)
    """The shapes that were run."""
    threads: int = 1
    clock: str = ""
    """What they are times of: see ``evaluate.turns``."""
    machine: str = ""
    """The processor; empty where none measured, but the cost model counted."""
    here: bool = False
    """Whether that is the one that this process runs on."""

    def added(self, linear: Linear, form: Form, path: Path) -> float:
        """Milliseconds that a linear takes longer than the source's. Raises ``BadInput`` for one
        that the table lacks."""
        if not self.machine:
            return 0.0
        size = signature(linear)
        known = self.linears.get(size, {})
        alone = _of(known, form.timed, f"a linear of {size} as {form.timed}")
        return alone + (_between(known, path) if path.rank else 0.0)

    def saved(self, signature: str, gone: float) -> float:
        """Milliseconds that a place saves without a share of its heads or units, its linears as the
        source has them; it has to be one that the table ``knows``."""
        return self.shares[signature][str(gone)]

    def knows(self, signature: str, gone: Iterable[float]) -> bool:
        """Whether the table has a place without each of some shares."""
        return self.shares.get(signature, {}).keys() >= {*map(str, gone)}

    def half(self, part: str) -> float:
        """Milliseconds that a half of a block takes, by its part. Raises as ``added``."""
        return _of(self.halves, part, f"blocks without their {part}" if part else "blocks left out")

    def behind(self, cut: str) -> float:
        """Milliseconds of the source behind a way to drop image tokens. Raises as ``added``."""
        return _of(self.cuts, cut, f"runs behind {cut}")

    def write(self, file: FilePath) -> None:
        file.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, file: FilePath) -> Times:
        """Raises ``BadInput`` for what is no such table."""
        try:
            return cls(**{**json.loads(file.read_text()), "here": False})
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{file} is not a table of times ({error}): {MAKE}") from None


def _of(known: Mapping[str, float], name: str, what: str) -> float:
    if name not in known:
        raise BadInput(f"the table of times has none of {what}: it is another model's; {MAKE}")
    return known[name]


def _between(known: Mapping[str, float], path: Path) -> float:
    """Of a path, by the line through the two ranks that were timed."""
    kind = (other for other in PATHS if other.bits == path.bits)
    ranks = {other.rank: known[str(other)] for other in kind if str(other) in known}
    if len(ranks) < 2:
        raise BadInput(f"the table of times has no paths of low rank: {MAKE}")
    (low, a), (high, b) = min(ranks.items()), max(ranks.items())
    return a + (b - a) * (path.rank - low) / (high - low)
