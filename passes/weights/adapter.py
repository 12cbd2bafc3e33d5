"""``adapter``: a LoRA adapter of PEFT, folded into the weights or kept as a path beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.moves import Factor, graft_low_rank
from ...ir.structure.recognize import Linear
from ...ir.structure.weights import readers
from ..base import REDEFINED, Context, Pass, PassResult, Site
from ..linear_pass import linear_site, weight_of
from ..stored import relative_error
from .delta_pass import is_changed
from .peft_files import Pair, opened


@dataclass(frozen=True, kw_only=True)
class Adapter(Pass):
    """Add a LoRA adapter: ``y = W x + s B (A x)``.

    LoRA (Hu et al. 2021, arXiv 2106.09685) as PEFT stores it (``peft_files``), also with rsLoRA's
    strength. ``fold`` adds ``s B A`` to the weight, in float32; without it the adapter stays a path
    of its own, also beside weights that are quantized. DoRA's (arXiv 2402.09353) is folded: each
    row of ``W + s B A`` gets the length that is stored for it. ``scale`` multiplies s. Refused: an
    adapter of another base (a module that the model lacks, or of another shape), other kinds of
    adapters, pickled ones, and to fold into a weight that is shared or that a pass has changed.
    """

    name: ClassVar[str] = "adapter"
    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (REDEFINED,)
    path: str
    """The folder of the adapter."""
    fold: bool = True
    """Add it to the weights; else a path beside them."""
    scale: float = 1.0
    """Times its own strength."""

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        for linear, pair in self._read(context):
            down, up = pair.down.read().float(), pair.up.read().float()
            up = up * (pair.strength * self.scale)
            if self.fold:
                weight = weight_of(context.view, linear).read()
                merged = _lengthened(weight.float() + up @ down, pair).to(weight.dtype)
                context.view.set_weight(linear.weight, context.spool.store(merged))
                result.sites.append(
                    self._site(context, linear, pair, relative_error(weight, merged))
                )
                continue
            dtype = context.view.type(linear.x).dtype or down.dtype
            stem, spool = f"{linear.name}.adapter", context.spool
            graft_low_rank(
                context.view, context.view.tensor(linear.node),
                Factor.dense(f"{stem}.down", spool.store(down.to(dtype))),
                [(linear.out, Factor.dense(f"{stem}.up", spool.store(up.to(dtype))))],
                rule=self.name, step=context.step,
            )  # fmt: skip
            result.sites.append(self._site(context, linear, pair))
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        result.sites += [self._site(context, *match) for match in self._read(context)]
        return result

    def _site(
        self, context: Context, linear: Linear, pair: Pair, error: float | None = None
    ) -> Site:
        weight = weight_of(context.view, linear)
        after = weight.nbytes if self.fold else weight.stored_bytes
        width = context.view.type(linear.x).dtype or pair.up.dtype
        extra = 0 if self.fold else (pair.down.numel + pair.up.numel) * width.itemsize
        note = f"rank {pair.down.shape[0]}"
        return linear_site(linear, weight.stored_bytes, after + extra, error, note=note)

    # --- the adapter -------------------------------------------------------------------------

    def _read(self, context: Context) -> list[tuple[Linear, Pair]]:
        base, pairs = opened(Path(self.path).expanduser())
        linears = {linear.name: linear for linear in context.structure.linears}
        matches = []
        for name, pair in pairs.items():
            if name not in linears:
                raise BadInput(
                    f"adapter: {self.path} changes {name}, which this model does not have as a "
                    f"linear: its base is {base}"
                )
            linear = linears[name]
            rank, rows = pair.down.shape[0], linear.out_features
            shapes = [(rows, rank), (rank, linear.in_features), (rows,)]
            stored = [part.shape for part in (pair.up, pair.down, pair.lengths) if part is not None]
            if stored != shapes[: len(stored)]:
                raise BadInput(
                    f"adapter: {self.path} holds {' and '.join(str(list(s)) for s in stored)} "
                    f"for {name}, which is [{rows}, {linear.in_features}] in this "
                    f"model: its base is {base}"
                )
            self._check_fold(context, linear, pair)
            matches.append((linear, pair))
        return matches

    def _check_fold(self, context: Context, linear: Linear, pair: Pair) -> None:
        if not self.fold and pair.lengths is not None:
            raise BadInput(
                f"adapter: {self.path} is DoRA's, which scales the rows of {linear.name} itself: "
                "no path beside it does that. Fold it, with fold=true"
            )
        if not self.fold:
            return
        if linear.quantized or is_changed(context, linear):
            raise BadInput(
                f"adapter: an earlier pass changed {linear.name}: put adapter first, or keep the "
                "adapter as a path with fold=false"
            )
        if len(readers(context.view, linear.weight)) > 1:
            raise BadInput(
                f"adapter: the weight of {linear.name} is shared, and the adapter is for one of "
                "its uses: keep the adapter as a path with fold=false"
            )


def _lengthened(matrix: Tensor, pair: Pair) -> Tensor:
    """The sum f32 ``[out, in]``, its rows as long as DoRA has them."""
    if pair.lengths is None:
        return matrix
    rows = torch.nn.functional.normalize(matrix, dim=1)
    return rows * pair.lengths.read().float()[:, None]
