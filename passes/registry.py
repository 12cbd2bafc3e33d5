"""Passes by name: the built-in ones, and those that other packages add by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.core.errors import BadInput, near_misses

if TYPE_CHECKING:
    from .base import Pass

GROUP = "graphwright.passes"
"""The entry point group of third-party passes: ``my-pass = "package.module:MyPass"``."""

_BUILT_IN = {
    "clean": "exact.clean:Clean",
    "fold-constants": "exact.fold_constants:FoldConstants",
    "bind": "exact.bind:Bind",
    "restrict-head": "exact.restrict_head:RestrictHead",
    "vocabulary": "exact.vocabulary:Vocabulary",
    "tree-mask": "exact.tree_mask:TreeMask",
    "bake-prefix": "exact.bake_prefix:BakePrefix",
    "rerank-by-attention": "exact.rerank_by_attention:RerankByAttention",
    "quantize": "weights.quantize:Quantize",
    "easyquant": "weights.easyquant:EasyQuant",
    "gptq": "weights.gptq:GPTQ",
    "hqq": "weights.hqq:HQQ",
    "autoround": "weights.autoround:AutoRound",
    "finequant": "weights.finequant:FineQuant",
    "aqlm": "weights.aqlm:AQLM",
    "awq": "weights.awq:AWQ",
    "smooth": "weights.smooth:Smooth",
    "w8a8": "weights.w8a8:W8A8",
    "quantize-cache": "weights.quantize_cache:QuantizeCache",
    "rotate": "weights.rotate:Rotate",
    "magnitude": "weights.magnitude:Magnitude",
    "wanda": "weights.wanda:Wanda",
    "gblm": "weights.gblm:GBLM",
    "sparsegpt": "weights.sparsegpt:SparseGPT",
    "dsnot": "weights.dsnot:DSnoT",
    "sparse-plus-low-rank": "weights.sparse_plus_low_rank:SparsePlusLowRank",
    "low-rank": "weights.low_rank_pass:LowRank",
    "welore": "weights.welore:WeLore",
    "flap": "weights.flap:FLAP",
    "ziplm": "weights.ziplm:ZipLM",
    "dormant-heads": "weights.dormant_heads:DormantHeads",
    "dare": "weights.dare:Dare",
    "merge": "weights.merge:Merge",
    "adapter": "weights.adapter:Adapter",
    "fastervlm": "tokens.fastervlm:FasterVLM",
    "fastv": "tokens.fastv:FastV",
    "diverse": "tokens.diverse:Diverse",
    "similarity": "tokens.similarity:Similarity",
    "fopru": "tokens.fopru:FoPru",
    "pyramid-drop": "tokens.pyramid_drop:PyramidDrop",
    "visual-exit": "tokens.visual_exit:VisualExit",
    "no-image": "tokens.visual_exit:NoImage",
    "aim": "tokens.aim:AIM",
    "globalcom2": "tokens.globalcom2:GlobalCom2",
    "tome": "tokens.tome:ToMe",
    "vtc-cls": "tokens.vtc_cls:VTCCLS",
    "vispruner": "tokens.vispruner:VisPruner",
    "ui-components": "tokens.ui_components:UiComponents",
    "pool-frames": "tokens.pool_frames:PoolFrames",
    "ts-llava": "tokens.ts_llava:TSLLaVA",
    "free-video": "tokens.free_video:FreeVideo",
    "quota": "tokens.quota:Quota",
    "intp-video": "tokens.intp_video:INTPVideo",
    "keep-entropy": "tokens.keep_entropy:KeepEntropy",
    "random-tokens": "tokens.random_tokens:RandomTokens",
    "uniform-tokens": "tokens.uniform_tokens:UniformTokens",
    "eora": "weights.eora:EoRA",
    "bitstack": "weights.bitstack:BitStack",
    "drop-blocks": "depth.drop_blocks:DropBlocks",
    "path": "depth.path:FollowPath",
    "cola": "depth.cola:CoLa",
    "search-path": "depth.search_path:SearchPath",
    "crash": "depth.crash:CRaSh",
    "das": "depth.das:DAS",
    "svd-compensate": "weights.svd_compensate:SvdCompensate",
}


def pass_names() -> list[str]:
    """Every pass that a recipe may name."""
    return sorted({*_BUILT_IN, *_third_party()})


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def class_name(name: str) -> str:
    """What the class of a pass is called, without importing it."""
    place = _BUILT_IN.get(name) or _third_party()[name].value
    return place.partition(":")[2]


def check_pass_name(name: str) -> None:
    """Raises ``BadInput`` with near misses where there is no such pass. Nothing is imported."""
    if name not in _BUILT_IN and name not in _third_party():
        hint = near_misses(name, pass_names()) or "`optimize-model passes` lists them"
        raise BadInput(f"there is no pass {name!r}; {hint}")


def source_of(name: str) -> tuple[Path, str] | None:
    """The file and the class of a built-in pass; ``None`` of another."""
    if name not in _BUILT_IN:
        return None
    module, _, attribute = _BUILT_IN[name].partition(":")
    return Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py"), attribute


def pass_class(name: str) -> type[Pass]:
    """The class of a pass. Raises ``BadInput`` with near misses where there is none."""
    from .base import Pass

    check_pass_name(name)
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        entry = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    else:
        entry = _third_party()[name].load()
    if not (isinstance(entry, type) and issubclass(entry, Pass)):
        raise BadInput(f"the entry point {name!r} is not a graphwright pass: {entry!r}")
    return entry
