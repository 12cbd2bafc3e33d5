"""A special case of a model: which of its inputs remain, and how outputs are the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..ir.core.scratch import Scratch
from ..ir.core.view import Original, Run, Source, Value, View
from ..ir.run.sweep import sweep

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Narrowing:
    """What a pass made of the graph before it: a case of it, on which the two agree exactly."""

    widen: Callable[[Inputs], Inputs]
    """The inputs of the graph before, of inputs of the graph as it is now."""
    narrow: Callable[[Inputs], Inputs]
    """The inputs of the graph now that lie nearest to inputs of the graph before: of another case
    than this one, they are made one of it."""
    outputs: Callable[[Outputs], Outputs]
    """What remains of outputs of the graph before."""
    lacking: Callable[[Inputs], str] = lambda _: ""
    """Why data of the graph before is of another case; empty where it is of this one."""
    folder: Scratch | None = None
    """Side files, where those of the source's folder do not fit any more."""
    before: View | None = None
    """The graph before with more outputs, where those that it has do not hold what remains: what
    ``outputs`` is then given is of it, and no other form of the model can judge what follows."""
    task: str | None = None
    """What the case is for, where that is another thing than the model was for."""


def narrowed(source: Source, case: Narrowing) -> Source:
    """The source of which the case is the whole: its samples, and what runs it."""
    original = source.original if case.before is None else _GraphBefore(case.before)
    changes = {} if case.folder is None else {"folder": str(case.folder.path), "owner": case.folder}
    return dataclasses.replace(
        source,
        sampler=lambda: [dict(case.narrow(batch)) for batch in source.samples],
        original=None if original is None else _NarrowedOriginal(original, case),
        truth=None,
        task=source.task if case.task is None else case.task,
        **changes,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class _GraphBefore:
    """Stands for the model where its own outputs say nothing of the case: our reading of it, which
    was held against the model before the first pass."""

    graph: View

    @property
    def by(self) -> str:
        return "the graph before the special case"

    def start(self, watched: Collection[str] = ()) -> Run:
        return partial(sweep, self.graph)

    def visible(self, view: View) -> Mapping[Value, str]:
        return {}


@dataclass(frozen=True)
class _NarrowedOriginal:
    """The whole model, asked for what remains of it alone."""

    original: Original
    case: Narrowing

    @property
    def by(self) -> str:
        return self.original.by

    def start(self, watched: Collection[str] = ()) -> Run:
        run = self.original.start()

        def narrowed_run(inputs: Inputs) -> Outputs:
            return self.case.outputs(run(self.case.widen(inputs)))

        return narrowed_run

    def visible(self, view: View) -> Mapping[Value, str]:
        """None: values inside are of other sizes than the model's own."""
        return {}
