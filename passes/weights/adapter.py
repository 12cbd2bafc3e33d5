"""``adapter``: a LoRA adapter of PEFT, folded into the weights or kept as a path beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight, read_safetensors_header
from ...ir.moves import Factor, graft_low_rank
from ...ir.structure.recognize import Linear
from ...ir.structure.weights import readers
from ..base import REDEFINED, Context, Pass, PassResult, Site
from ..linear_pass import linear_site, weight_of
from ..stored import relative_error
from .delta_pass import is_changed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
_UNREAD = {
    "use_dora": "DoRA's magnitudes", "modules_to_save": "whole modules beside the adapter",
    "rank_pattern": "ranks by pattern", "alpha_pattern": "alphas by pattern",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """``down [r, in]`` and ``up [out, r]`` of one linear."""

    down: Weight
    up: Weight


@dataclass(frozen=True, kw_only=True)
class Adapter(Pass):
    """Add a LoRA adapter: ``y = W x + s B (A x)``.

    LoRA (Hu et al. 2021, arXiv 2106.09685), in the form of PEFT: a folder with
    ``adapter_config.json`` and ``adapter_model.safetensors``; ``s = alpha / r``, or ``alpha /
    sqrt(r)`` where ``use_rslora`` says so. ``fold`` adds ``s B A`` to the weight, in float32;
    without it the adapter stays a path of its own, also beside weights that are quantized.
    ``scale`` multiplies s. Refused: an adapter of another base (a module that the model lacks, or
    of another shape), other kinds of adapters, pickled ones, and to fold into a weight that is
    shared or that an earlier pass changed.
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
        scaling, pairs = self._read(context)
        for linear, pair in pairs:
            down, up = pair.down.read().float(), self._scaled(pair, scaling)
            if self.fold:
                weight = weight_of(context.view, linear).read()
                merged = (weight.float() + up @ down).to(weight.dtype)
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
        result.sites += [self._site(context, *match) for match in self._read(context)[1]]
        return result

    def _scaled(self, pair: Pair, scaling: float) -> Tensor:
        return pair.up.read().float() * (scaling * self.scale)

    def _site(
        self, context: Context, linear: Linear, pair: Pair, error: float | None = None
    ) -> Site:
        size = weight_of(context.view, linear).nbytes
        width = context.view.type(linear.x).dtype or pair.up.dtype
        extra = 0 if self.fold else (pair.down.numel + pair.up.numel) * width.itemsize
        return linear_site(linear, size, size + extra, error, note=f"rank {pair.down.shape[0]}")

    # --- the adapter -------------------------------------------------------------------------

    def _read(self, context: Context) -> tuple[float, list[tuple[Linear, Pair]]]:
        config, pairs = _opened(Path(self.path).expanduser())
        base = config.get("base_model_name_or_path") or "one that it does not name"
        linears = {linear.name: linear for linear in context.structure.linears}
        matches = []
        for name, pair in pairs.items():
            if name not in linears:
                raise BadInput(
                    f"adapter: {self.path} changes {name}, which this model does not have as a "
                    f"linear: its base is {base}"
                )
            linear = linears[name]
            expected = ((linear.out_features, pair.down.shape[0]),
                        (pair.up.shape[1], linear.in_features))  # fmt: skip
            if (pair.up.shape, pair.down.shape) != expected:
                raise BadInput(
                    f"adapter: {self.path} holds {list(pair.up.shape)} and {list(pair.down.shape)} "
                    f"for {name}, which is [{linear.out_features}, {linear.in_features}] in this "
                    f"model: its base is {base}"
                )
            self._check_fold(context, linear)
            matches.append((linear, pair))
        ranks = {pair.down.shape[0] for pair in pairs.values()}
        if ranks != {config["r"]}:
            raise BadInput(f"adapter: {self.path}: r={config['r']}, and its tensors have {ranks}")
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        return config["lora_alpha"] / root, matches

    def _check_fold(self, context: Context, linear: Linear) -> None:
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


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """The configuration, and the factors by the names of the modules that they change."""
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise BadInput(
            f"adapter: path={folder} is not a folder with {CONFIG} and {TENSORS}; of a pickled "
            "adapter (.bin) save safetensors first"
        )
    config = _config(folder / CONFIG)
    tensors = dict(read_safetensors_header(folder / TENSORS))
    return config, _pairs(tensors, folder / TENSORS)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise BadInput(f"{file}: peft_type is {kind!r}; only LORA is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise BadInput(f"{file}: r={rank!r} and lora_alpha={alpha!r} are no rank and no number")
    unread = [what for name, what in _UNREAD.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        unread.append("biases")
    if config.get("fan_in_fan_out"):
        unread.append("weights stored [in, out]")
    if unread:
        raise BadInput(f"{file}: it has {', '.join(unread)}, which is not read")
    return config


def _pairs(tensors: Mapping[str, Weight], file: Path) -> dict[str, Pair]:
    stems = {name.removesuffix(A).removesuffix(B) for name in tensors}
    pairs = {}
    for stem in sorted(stems):
        if stem + A not in tensors or stem + B not in tensors:
            raise BadInput(f"{file}: {stem} has no pair of matrices ending in {A} and {B}")
        down, up = tensors[stem + A], tensors[stem + B]
        if len(down.shape) != 2 or len(up.shape) != 2:
            raise BadInput(f"{file}: the factors of {stem} are not matrices")
        pairs[stem.removeprefix(PREFIX)] = Pair(down, up)
    if not pairs:
        raise BadInput(f"{file}: it holds no tensor")
    return pairs
