"""Base of the passes that add what fine-tuning changed in other checkpoints."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.view import Value
from ...ir.core.weights import Weight
from ...ir.structure.recognize import Linear
from ..base import REDEFINED, Context, Pass, PassResult, Site
from ..linear_pass import weight_of
from ..stored import relative_error
from .checkpoint import counterpart, parameters, read_checkpoint


@dataclass(frozen=True)
class Parameter:
    """A weight of the graph and the tensors of its name in the checkpoints, in their order."""

    name: str
    value: Value
    weight: Weight
    others: Sequence[Weight]


@dataclass(frozen=True, kw_only=True)
class DeltaPass(Pass):
    """Base: each weight ``W`` becomes a sum of itself and tensors of its name elsewhere.

    Checkpoints are safetensors files, or folders that hold them, of the model's own architecture:
    a tensor of another shape is refused, and a weight of which one of them lacks the tensor. What
    the passes behind compensate is the gap to the sum; those in front must not have changed it.
    ``exclude`` are globs on names of weights that stay as they are. Sums are taken in float32 and
    stored in the model's dtype.
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (REDEFINED,)
    exclude: tuple[str, ...] = ()
    """Globs of the weights to leave alone."""

    @abstractmethod
    def places(self) -> Mapping[str, str]:
        """The checkpoints that are read, by the options that name them, in order."""

    @abstractmethod
    def combined(self, weight: Tensor, others: Sequence[Tensor], name: str) -> Tensor:
        """The weight's new numbers f32; ``others`` f32 are in the order of ``places``."""

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self._chosen(context, result)
        for i, parameter in enumerate(chosen):
            context.progress(f"{self.name}: {parameter.name}", i, len(chosen))
            before = parameter.weight.read()
            others = [other.read().float() for other in parameter.others]
            after = self.combined(before.float(), others, parameter.name)
            if not torch.isfinite(after).all():
                raise BadInput(f"{self.name}: {parameter.name} would hold NaN or infinities")
            after = after.to(before.dtype)
            context.view.set_weight(parameter.value, context.spool.store(after))
            result.sites.append(_site(parameter, relative_error(before, after)))
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        result.sites += [_site(parameter) for parameter in self._chosen(context, result)]
        return result

    def _chosen(self, context: Context, result: PassResult) -> list[Parameter]:
        checkpoints = {
            f"{option}={path}": read_checkpoint(path, f"{self.name}: {option}")
            for option, path in self.places().items()
        }
        chosen = []
        for name, value, weight in parameters(context.view, self.exclude):
            lacking = [place for place, tensors in checkpoints.items() if name not in tensors]
            if lacking:
                result.refused.append((name, f"{lacking[0]} holds no tensor of this name"))
                continue
            others = [
                counterpart(tensors, name, weight, f"{self.name}: {place}")
                for place, tensors in checkpoints.items()
            ]
            chosen.append(Parameter(name, value, weight, others))
        self._require_all(context, chosen, dict(result.refused))
        return chosen

    def _require_all(
        self, context: Context, chosen: Sequence[Parameter], refused: Mapping[str, str]
    ) -> None:
        """Raises ``BadInput`` where a linear is left out, or was changed before: what is learned
        elsewhere is added to the model, not to what compression made of it."""
        values = {parameter.value for parameter in chosen}
        for linear in context.structure.linears:
            name = context.view.name(linear.weight).removesuffix(".T")
            if name in refused:
                raise BadInput(
                    f"{self.name}: {refused[name]}: {name}. These are not checkpoints of one "
                    "architecture; exclude= leaves a weight as it is"
                )
            if linear.quantized or (linear.weight in values and is_changed(context, linear)):
                raise BadInput(
                    f"{self.name}: an earlier pass changed {linear.name}: put {self.name} first"
                )
        if not chosen:
            raise BadInput(f"{self.name}: no weight of the model is left to change")


def is_changed(context: Context, linear: Linear) -> bool:
    """Whether a linear's weight is no more the model's own; in a forecast, whether it will be."""
    if context.original is None:
        return linear.name in context.planned
    then = context.original_linears.get(linear.name)
    return then is None or context.original_weight(linear).key != weight_of(
        context.view, linear
    ).key


def dropped(delta: Tensor, p: float, seed: int, name: str) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): ``b delta / (1 - p)``, b from Bernoulli(1 - p)."""
    if not p:
        return delta
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    mask = torch.rand(delta.shape, generator=generator) >= p
    return torch.where(mask, delta / (1 - p), 0.0)


def check_share(pass_: str, option: str, p: float) -> None:
    """Raises ``BadInput`` where ``p`` is not a share that leaves anything."""
    if not 0 <= p < 1:
        raise BadInput(f"{pass_}: {option}={p} must be at least 0 and below 1")


def _site(parameter: Parameter, error: float | None = None) -> Site:
    weight = parameter.weight
    return Site(parameter.name, "weight", weight.shape, weight.nbytes, weight.nbytes, rel_l2=error)
