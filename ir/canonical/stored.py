"""What only reshapes a constant is taken on its handle, where it costs nothing.

reshape(w), squeeze(w), unsqueeze(w) => w in that shape
"""

from __future__ import annotations

from typing import Any

from ..core.view import Operand, Value
from ..rewrite.pattern import Match
from ..rewrite.rule import Build, Rule


class FuseStoredReshape(Rule):
    """reshape(w) => w in that shape"""

    name = "fuse-stored-reshape"

    def pattern(self, p: Any, w: Any) -> Any:
        return p.reshape(w, rest=True)

    def where(self, match: Match) -> None:
        handle = match.weight("w")
        result = match.view.type(match.view.result(match.root))
        if result.numel != handle.numel or match.view.is_output(match.view.result(match.root)):
            match.refuse(f"the result {result} is an output, or not all of its sizes are known")

    def replace(self, build: Build, **bound: Operand) -> Value:
        view, handle = build.view, build.match.weight("w")
        shape = view.type(view.result(build.match.root)).shape or ()
        sizes = tuple(size for size in shape if isinstance(size, int))
        return view.add_weight(view.name(build.match.value("w")), handle.reshaped(sizes))


class FuseStoredSqueeze(FuseStoredReshape):
    """squeeze(w) => w in that shape"""

    name = "fuse-stored-squeeze"

    def pattern(self, p: Any, w: Any) -> Any:
        return p.squeeze(w)


class FuseStoredUnsqueeze(FuseStoredReshape):
    """unsqueeze(w) => w in that shape"""

    name = "fuse-stored-unsqueeze"

    def pattern(self, p: Any, w: Any) -> Any:
        return p.unsqueeze(w)


RULES: tuple[type[Rule], ...] = (FuseStoredReshape, FuseStoredSqueeze, FuseStoredUnsqueeze)
