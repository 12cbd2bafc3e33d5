"""The order in which the blocks of all sites are loaded (BitStack, arXiv 2410.23918).

Both orders go level by level: every site has its b-th block before any has its next, so that no
matrix is more than a block ahead of another. They differ in what comes first within a level.

zoo:tiny-llama, 8 blocks of the default rank, perplexity on 60 windows (source 34.6) at so many
times the bytes of the first blocks:

====================================  ====  ====  ====  ====  ====
order                                    2   2.5     3   3.5     4
====================================  ====  ====  ====  ====  ====
level by level, by energy             75.8  55.3  45.4  41.5  39.1
level by level, by perplexity         75.8  53.9  45.4  40.5  39.1
by energy for bytes, whatever level   96.3  58.8  52.5  48.1  44.2
====================================  ====  ====  ====  ====  ====
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Node, View
from ...ir.core.weights import Weight
from ...ir.ops.linear_bitstack import dense
from ...ir.run.sweep import Results, sweep_together
from ...ir.structure.recognize import Linear
from ..base import Context

SORTED_ROWS = 32
"""Rows of calibration data that perplexities are measured on, as in the paper."""
Order = list[tuple[str, int]]
"""Blocks (site, index), the first to be loaded first."""


def by_levels(energies: Mapping[str, Sequence[float]], sizes: Mapping[str, int]) -> Order:
    """In each level, first the site with most energy left over for the bytes that its block takes;
    of two alike, the earlier one.

    ``energies`` are those that 0, 1, 2, ... blocks leave over, ``sizes`` the bytes of one block.
    """
    blocks = min(map(len, energies.values()), default=1) - 1
    return [
        (name, block)
        for block in range(blocks)
        for name in sorted(energies, key=lambda n: -energies[n][block] / sizes[n])
    ]


@dataclass(frozen=True)
class Stacked:
    """The blocks of one matrix and the linears that multiply by it."""

    signs: Sequence[Weight]
    factors: Sequence[Weight]
    linears: Sequence[Linear]

    def block(self, index: int) -> Tensor:
        """What the block adds to the matrix: f32 ``[out, in]``."""
        parts = self.signs[index].read(), self.factors[index].read()
        return dense(*parts, self.linears[0].out_features)


def by_perplexity(context: Context, stacks: Mapping[str, Stacked], blocks: int) -> Order:
    """In each level, first the site whose next block alone gives the least perplexity.

    The paper's: from every site at b blocks, each in turn gets one more, and the calibration data's
    perplexity is measured; a level of n sites takes n sweeps over the whole graph, and the matrices
    of a level are held in float32. The first blocks keep the order of the sites: none is loaded
    without all.
    """
    rows = _rows(context)
    weights = {name: stack.block(0) for name, stack in stacks.items()}
    order: Order = [(name, 0) for name in stacks]
    for block in range(1, blocks):
        context.progress("bitstack: the order of the blocks", block - 1, blocks - 1)
        losses = {}
        for name, stack in stacks.items():
            more = weights[name] + stack.block(block)
            losses[name] = _loss(context, rows, stacks, {**weights, name: more})
        for name in sorted(stacks, key=lambda n: losses[n]):
            order.append((name, block))
            weights[name] += stacks[name].block(block)
    return order


def check_predicts(view: View) -> None:
    """Raises ``BadInput`` for a graph that has no perplexity."""
    if "input_ids" not in view.input_names() or "logits" not in view.output_names():
        raise BadInput(
            "bitstack: order=perplexity is for models that predict the next token: with input_ids "
            "among the inputs and logits among the outputs. Use order=levels"
        )


def _rows(context: Context) -> list[Mapping[str, Tensor]]:
    """The first rows of the calibration data."""
    rows: list[Mapping[str, Tensor]] = []
    missing = SORTED_ROWS
    for batch in context.calibration:
        if missing > 0:
            rows.append({name: tensor[:missing] for name, tensor in batch.items()})
            missing -= len(batch["input_ids"])
    return rows


def _loss(
    context: Context, rows: Sequence[Mapping[str, Tensor]], stacks: Mapping[str, Stacked],
    weights: Mapping[str, Tensor],
) -> float:  # fmt: skip
    """The mean negative log-likelihood of a token where the sites hold ``weights``; infinity where
    it is not a number, so that such a block comes last in its level."""
    view = context.view
    matrices = {
        linear.node: (linear, weights[name])
        for name, stack in stacks.items()
        for linear in stack.linears
    }

    def visit(node: Node, arguments: list[list[Tensor]], results: list[Results]) -> list[Results]:
        linear, weight = matrices[node]
        place = view.arguments(linear.node).index(view.tensor(linear.node))
        handle = None if linear.bias is None else view.weight(linear.bias)
        bias = None if handle is None else handle.read().float()
        inputs = [batch[place] for batch in arguments]
        return [
            (torch.nn.functional.linear(x.float(), weight, bias).to(y.dtype),)
            for x, (y,) in zip(inputs, results, strict=True)
        ]

    outputs = sweep_together(view, rows, visit, frozenset(matrices))
    total = count = 0.0
    for row, output in zip(rows, outputs, strict=True):
        mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))[:, 1:].bool()
        scores = output["logits"][:, :-1].double().log_softmax(-1)
        likely = scores.gather(2, row["input_ids"][:, 1:, None].long())[..., 0]
        total -= float(likely[mask].sum())
        count += int(mask.sum())
    return total / count if count and math.isfinite(total) else math.inf
