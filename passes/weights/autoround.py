"""``autoround``: rounding learned by sign descent, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Value
from ...ir.ops.pack import dequantize
from ...ir.run.blocks import BlockGraph, block_graphs, captured
from ...ir.structure.recognize import Linear
from ..base import Context, Needs, PassResult
from ..linear_pass import weight_of
from ..stored import Shelved, Stored
from .descent import Rounding, descend
from .quantized import Quantized
from .quantizers import rtn
from .table_pass import TablePass


@dataclass(frozen=True, kw_only=True)
class AutoRound(TablePass):
    """Learn which way each weight is rounded, and how far ranges shrink, from blocks' outputs.

    AutoRound (Cheng et al. 2023, arXiv 2309.05516): ``code = round(w / s + v) + zero``, ``s`` the
    scale of ``quantize`` times a factor of its group; ``v`` within half a step and the factors
    within 0.5 and 1 follow ``-sign(gradient)`` of the squared error of their block's output, for
    ``steps`` batches at a rate that falls from ``1 / steps`` to 0. A block's inputs come from the
    blocks before it as they are stored, its target from the graph before this pass. The best of
    the start and eight points on the way is kept, as four batches judge them.

    This is the one pass that computes gradients: a step takes about three times what the block
    takes forward, on one batch (of 8 texts, unless the data says otherwise). Linears outside of
    blocks, such as the head, and in blocks with an op that runs outside of torch are rounded to
    nearest, and say so. Needs calibration data. Weights
    that are not finite are refused.
    """

    name: ClassVar[str] = "autoround"
    needs: ClassVar[Needs] = Needs(calibration=True)
    fits_together: ClassVar[bool] = True
    weights_per_second: ClassVar[float] = 2e3
    symmetric: bool = True
    """Fix the zero point at the middle; else one a group."""
    steps: int = 200
    """Of descent, each block."""
    seed: int = 0
    """Of the batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise BadInput(f"autoround: steps={self.steps} must be at least 1")

    def run_linears(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self.choose(context, result)
        groups = self.groups(context.view, chosen)
        leaders = {name: group[0] for group in groups for name in group}
        learned = self._learned(context, [x for x in chosen if leaders[x.name] == x.name])
        forms: dict[str, Shelved] = {}
        for linear in chosen:
            leader = leaders[linear.name]
            if leader in forms:
                forms[linear.name] = forms[leader]
                continue
            stored = learned.get(linear.name)
            if stored is None:
                note = "in no block that has gradients: rounded to nearest"
                stored = self.stored(self._start(context, linear), note)
            forms[linear.name] = Shelved.of(stored, context.spool)
        self.put_all(context, chosen, forms, result)
        return result

    def _start(self, context: Context, linear: Linear) -> Quantized:
        return rtn(
            weight_of(context.view, linear).read(), self.bits, self.group, self.symmetric,
            scale_dtype=self.scale_dtype, name=linear.name,
        )  # fmt: skip

    # --- block by block ----------------------------------------------------------------------

    def _learned(self, context: Context, linears: Sequence[Linear]) -> dict[str, Stored]:
        """The stored forms of the linears that lie in blocks."""
        view, blocks = context.view, context.structure.blocks
        graphs = block_graphs(view, blocks)
        first = {b.tower: i for i, b in reversed(list(enumerate(blocks)))}.values()
        values = [graphs[i].entry for i in first] + [v for g in graphs for v in g.outside]
        rows = captured(view, context.calibration, list(dict.fromkeys(values))) if graphs else []
        all_forms: dict[str, Stored] = {}
        dense: list[Tensor] = []
        stored: list[Tensor] = []
        for i, (graph, block) in enumerate(zip(graphs, blocks, strict=True)):
            context.progress(f"{self.name}: block {i}", i, len(graphs))
            if i in first:
                dense = [row[graph.entry] for row in rows]
                stored = list(dense)
            names = () if graph.without_gradient() else block.linears
            inside = {
                x.weight: x for x in linears if x.name in names and x.weight in graph.weights
            }
            targets = _outputs(graph, dense, rows, {})
            learn = partial(self._block, context, graph, inside, stored, rows, targets)
            forms = context.once(f"block {i}", learn)
            block_forms = {name: Stored(**form) for name, form in forms.items()}
            weights = {v: _dense(block_forms[x.name], v, graph) for v, x in inside.items()}
            stored, dense = _outputs(graph, stored, rows, weights), targets
            all_forms.update(block_forms)
        return all_forms

    def _block(
        self, context: Context, graph: BlockGraph, linears: Mapping[Value, Linear],
        inputs: Sequence[Tensor], outside: Sequence[Mapping[Value, Any]],
        targets: Sequence[Tensor],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        roundings = {
            value: Rounding.of(weight_of(context.view, x).read(), self._start(context, x))
            for value, x in linears.items()
        }
        if not roundings:
            return {}
        share = descend(
            graph, roundings, inputs, outside, targets, steps=self.steps, seed=self.seed
        )
        note = f"of rounding's error in the block's output {share:.0%} is left"
        forms = {x.name: roundings[v].quantized() for v, x in linears.items()}
        return {name: vars(self.stored(form, note)) for name, form in forms.items()}

    def zero_points(self) -> Literal["none", "integer", "real"]:
        return "none" if self.symmetric else "integer"


def _outputs(
    graph: BlockGraph, inputs: Sequence[Tensor], outside: Sequence[Mapping[Value, Any]],
    weights: Mapping[Value, Tensor],
) -> list[Tensor]:  # fmt: skip
    """What a block makes of each batch, with some of its weights replaced."""
    known = {**graph.constants(), **weights}
    with torch.no_grad():
        return [graph.run(x, o, known) for x, o in zip(inputs, outside, strict=True)]


def _dense(stored: Stored, value: Value, graph: BlockGraph) -> Tensor:
    """The matrix that a stored form stands for, in the dtype of the weight."""
    attrs = {name: stored.attrs[name] for name in ("bits", "group", "in_features")}
    codes, scales, zeros = stored.operands.values()
    weight = graph.view.default(value)
    assert weight is not None and codes is not None and scales is not None
    return dequantize(codes, scales, zeros, **attrs).to(weight.dtype)
