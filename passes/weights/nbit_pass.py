"""What all passes that store weights in few bits share: choosing sites, swapping, reporting."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.types import Type
from ...ir.core.view import View
from ...ir.core.weights import Weight
from ...ir.moves import graft, swap
from ...ir.ops.linear_nbit import operand_types
from ...ir.ops.pack import BITS, GROUPS
from ...ir.ops.sparse_linear import index_dtype
from ...ir.structure.recognize import Linear
from ..base import STORED, Context, Pass, PassResult, Site, select_linears
from .quantized import Quantized

ScaleName = Literal["float32", "float16"]
SCALE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass
class _Stored:
    """One quantized matrix, as its linear holds it."""

    weights: list[tuple[str, Weight] | None]
    outliers: list[tuple[str, Weight]]
    bytes_after: int
    rel_l2: float


@dataclass(frozen=True, kw_only=True)
class WeightPass(Pass):
    """Base of the passes that swap linears for ``linear_nbit``.

    ``bits`` is 2, 3, 4 or 8; ``group`` is 16 to 256 (a power of two) input features that share a
    scale, or 0 for one scale per output row. Where a group does not divide the input features, the
    last one is padded with codes that multiply nothing. ``scales`` is the dtype in which scales are
    stored; a matrix whose scales would suffer from float16's range keeps float32. ``include`` and
    ``exclude`` are globs on site names, ``kinds`` are roles (``q``, ``up``); ``min_size`` is
    the least number of weights of a matrix. ``accuracy_level=4`` rounds activations to 8 bits in
    each group and computes in integers, 0 computes in floats. Unless it is given, 8 bits take 4 (on
    the reference CPU 0 is slower than the dense matrix, 4 up to twice as fast) and fewer bits take
    0 (which rounds nothing and is as fast).
    """

    exact: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = (STORED,)
    excludes: ClassVar[tuple[str, ...]] = (STORED,)
    bits: int = 4
    group: int = 32
    scales: ScaleName = "float16"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    min_size: int = 0
    accuracy_level: Literal[0, 4] | None = None
    weights_per_second: ClassVar[float] = 2e7
    """Matrix entries quantized a second on one core of the reference CPU: forecasts use it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise BadInput(f"{self.name}: bits={self.bits} must be one of {_list(BITS)}")
        if self.group not in GROUPS:
            raise BadInput(
                f"{self.name}: group={self.group} must be one of {_list(GROUPS[1:])}, or 0 for one "
                "scale per row (ONNX Runtime stores blocks of these sizes)"
            )
        if self.accuracy_level == 4 and self.bits not in (4, 8):
            raise BadInput(
                f"{self.name}: accuracy_level=4 needs bits=4 or 8, not {self.bits}: narrower codes "
                "are widened when the model runs"
            )
        if self.min_size < 0:
            raise BadInput(f"{self.name}: min_size={self.min_size} must not be negative")

    @abstractmethod
    def quantize(self, weight: torch.Tensor, name: str) -> Quantized:
        """Codes, scales and the rest of one matrix [out, in]; ``name`` is for errors."""

    @abstractmethod
    def zero_points(self) -> Literal["none", "integer", "real"]:
        """What kind of zero points the pass stores."""

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scales]

    @property
    def level(self) -> int:
        """The accuracy level that is stored."""
        if self.accuracy_level is None:
            return 4 if self.bits == 8 else 0
        return self.accuracy_level

    def outlier_rate(self) -> float:
        """Share of weights that the pass keeps exactly, as a forecast."""
        return 0.0

    # --- the pass ----------------------------------------------------------------------------

    def run(self, context: Context) -> PassResult:
        result = PassResult()
        chosen = self._choose(context, result)
        stored: dict[Hashable, _Stored] = {}
        for done, linear in enumerate(chosen):
            context.progress(f"{self.name}: {linear.name}", done, len(chosen))
            weight = context.view.weight(linear.weight)
            assert weight is not None
            if weight.key not in stored:
                stored[weight.key] = self._store(context, linear, weight)
            self._replace(context, linear, weight, stored[weight.key], result)
        context.progress(self.name, len(chosen), len(chosen))
        context.edited()
        return result

    def plan(self, context: Context) -> PassResult:
        result = PassResult()
        for linear in self._choose(context, result):
            weight = context.view.weight(linear.weight)
            assert weight is not None
            size = self.predicted_bytes(linear.in_features, linear.out_features)
            result.sites.append(self._site(linear, weight, size, None))
        return result

    def seconds(self, planned: PassResult) -> float:
        return sum(s.shape[0] * s.shape[1] for s in planned.sites) / self.weights_per_second

    def peak_bytes(self, planned: PassResult) -> int:
        largest = max((s.shape[0] * s.shape[1] for s in planned.sites), default=0)
        return largest * 4 * 6

    def predicted_bytes(self, in_features: int, out_features: int) -> int:
        """Bytes of codes, scales, zero points and the forecast outliers of one matrix."""
        types = operand_types(
            in_features, out_features, bits=self.bits, group=self.group,
            zeros=self.zero_points(), scale_dtype=self.scale_dtype,
        )  # fmt: skip
        total = sum(_bytes(t) for t in types if t is not None)
        outliers = int(self.outlier_rate() * in_features * out_features)
        width = index_dtype(in_features).itemsize + index_dtype(out_features).itemsize
        return total + outliers * (width + 4)

    def _choose(self, context: Context, result: PassResult) -> list[Linear]:
        chosen = select_linears(
            context.structure.linears,
            include=self.include, exclude=self.exclude, kinds=self.kinds, min_size=self.min_size,
        )  # fmt: skip
        fit = []
        for linear in chosen:
            reason = reason_against(context.view, linear)
            if reason is None:
                fit.append(linear)
            else:
                result.refused.append((linear.name, reason))
        return fit

    def _store(self, context: Context, linear: Linear, weight: Weight) -> _Stored:
        made = context.once(f"site {linear.name}", lambda: self._quantized(weight, linear.name))
        weights: list[tuple[str, Weight] | None] = [
            None if tensor is None else (name, context.spool.store(tensor))
            for name, tensor in zip(("codes", "scales", "zeros"), made["operands"], strict=True)
        ]
        outliers = [
            (f"outliers.{name}", context.spool.store(part))
            for name, part in zip(("rows", "cols", "values"), made["outliers"], strict=False)
        ]
        return _Stored(weights, outliers, made["bytes"], made["rel_l2"])

    def _quantized(self, weight: Weight, name: str) -> dict[str, Any]:
        """What is stored of one matrix, and its error."""
        dense = weight.read()
        made = self.quantize(dense, name)
        gap = torch.linalg.norm(made.dequantized() - dense.float())
        error = float(gap / torch.linalg.norm(dense.float()).clamp_min(1e-30))
        kept = made.outliers
        side = [] if kept is None or not kept.values.numel() else [
            kept.rows, kept.cols, kept.values
        ]  # fmt: skip
        return {
            "operands": list(made.operands()), "outliers": side, "bytes": made.nbytes,
            "rel_l2": error,
        }  # fmt: skip

    def _replace(
        self, context: Context, linear: Linear, weight: Weight, stored: _Stored, result: PassResult
    ) -> None:
        attrs = {
            "bits": self.bits, "group": self.group, "in_features": linear.in_features,
            "out_features": linear.out_features, "accuracy_level": self.level,
        }  # fmt: skip
        # A linear that feeds this one directly may have been swapped since the sites were chosen.
        current = replace(linear, x=context.view.operands(linear.node)[0])
        try:
            swapped = swap(
                context.view, current, "linear_nbit", stored.weights, attrs,
                rule=self.name, step=context.step,
            )  # fmt: skip
        except Refusal as refusal:
            result.refused.append((linear.name, str(refusal)))
            return
        if stored.outliers:
            named = [(f"{linear.name}.{name}", handle) for name, handle in stored.outliers]
            graft(
                context.view, swapped.out, swapped.x, "sparse_linear", named,
                {"out_features": linear.out_features}, rule=self.name, step=context.step,
            )  # fmt: skip
        result.sites.append(self._site(linear, weight, stored.bytes_after, stored.rel_l2))

    def _site(self, linear: Linear, weight: Weight, size: int, error: float | None) -> Site:
        return Site(
            name=linear.name,
            kind=linear.role or "linear",
            shape=(linear.out_features, linear.in_features),
            bytes_before=weight.nbytes,
            bytes_after=size,
            bits_per_weight=8 * size / weight.numel,
            rel_l2=error,
        )


def reason_against(view: View, linear: Linear) -> str | None:
    """Why a linear's weight cannot be stored in another form; ``None`` where it can."""
    if view.op(linear.node) != "linear":
        bits = view.attrs(linear.node).get("bits")
        return "its weight is quantized already" + (f", to {bits} bits" if bits else "")
    weight = view.weight(linear.weight)
    if weight is None or not weight.dtype.is_floating_point:
        return "its weight is not a floating-point constant"
    if any(view.op(user) != "linear" for user in view.users(linear.weight)):
        return "its weight is tied to an embedding, which keeps it: nothing would be saved"
    return None


def _bytes(type_: Type) -> int:
    assert type_.dtype is not None
    return (type_.numel or 0) * type_.dtype.itemsize


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


