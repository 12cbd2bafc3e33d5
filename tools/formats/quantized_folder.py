"""Hugging Face folders of quantized weights: as compressed-tensors and as GPTQ.

Layouts as ``compressed_tensors`` and ``gptq`` of ``ir.load.checkpoints`` read them. Codes, scales
and whole zero points are those of the artifact; real zero points have no place in either.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backends.artifacts.artifact import SIDE_FILES, copy_side_files
from ...ir.core.errors import BadInput
from ...ir.core.weights import Weight
from ...ir.load.checkpoints.packed_bits import pack_rows
from ...ir.ops.coded_weight import coded
from ...ir.ops.nbit_weight import NBitWeight
from . import peft_adapter
from .model_state import ModelState, PackedLinear, narrowed, read_state
from .safetensors_file import Entry, write


def write_compressed_tensors(artifact: Path, out: Path) -> list[str]:
    """``pack-quantized``; what a person should know."""
    return _write(artifact, out, _packed_entries, _packed_config, names=_as_saved)


def write_gptq(artifact: Path, out: Path) -> list[str]:
    """GPTQ, version 1 where all zero points are the middle code, else version 2. Its scales are
    float16: wider ones, as of 8 bits, are rounded, and the notes say so."""
    return _write(artifact, out, _gptq_entries, _gptq_config, scales=torch.float16,
                  names=_rows_whole)  # fmt: skip


def _write(
    artifact: Path, out: Path, entries: Callable[[PackedLinear], Iterator[Entry]],
    config: Callable[[ModelState], dict[str, Any]], scales: torch.dtype | None = None,
    names: Callable[[ModelState], ModelState] | None = None,
) -> list[str]:  # fmt: skip
    state = read_state(artifact)
    for name in sorted(state.stacked):
        raise BadInput(f"{name} is a part of a stack of experts, whose matrices have no names in "
                       "this format: --to gguf writes them")  # fmt: skip
    if names is not None:
        state = names(state)
    kept = {name: held.form for name, weight in state.whole.items() if (held := coded(weight))}
    if not state.packed:
        if kept:
            raise BadInput(
                f"{artifact}: its {len(kept)} linears are kept as their source stores them "
                f"({', '.join(sorted({*kept.values()}))}), which this format cannot hold: make it "
                "with quantize, which rounds them anew"
            )
        raise BadInput(f"{artifact}: no linear is quantized; make it with quantize")
    for linear in state.packed.values():
        if linear.real_zeros:
            raise BadInput(
                f"{linear.name} has real zero points (hqq), which this format cannot hold: make "
                "the artifact with quantize, symmetric or not"
            )
    settings = config(state)
    written = [entry for linear in state.packed.values() for entry in entries(linear)]
    written += [
        _whole(name, narrowed(weight, state.dtype())) for name, weight in state.whole.items()
    ]
    write(out / "model.safetensors", written)
    copy_side_files(str(artifact), out)
    described = {**state.config, "quantization_config": settings}
    (out / SIDE_FILES[0]).write_text(json.dumps(described, indent=2) + "\n")
    notes = [f"{len(state.packed)} linears in few bits, {len(state.whole)} tensors whole"]
    tables = [name for name, weight in state.whole.items() if isinstance(weight, NBitWeight)]
    if tables:
        notes.append(f"stored in few bits in the artifact, whole here: {', '.join(tables)}")
    if kept:
        notes.append(f"in codes of the source in the artifact, whole here: {', '.join(kept)}")
    wide = [x for x in state.packed.values() if scales and x.stored[1].dtype != scales]
    if wide:
        notes.append(f"scales of {len(wide)} linears rounded to float16, 5e-4 of each at most")
    if state.paths:
        (out / "adapter").mkdir()
        notes += peft_adapter.write_paths(state, out / "adapter")
    return notes


_EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Of Mixtral's experts, by the names that others have."""


def _as_saved(state: ModelState) -> ModelState:
    """The state by the names that checkpoints have for it: transformers' own model has others for
    the experts of Mixtral, by which GPTQModel looks for them."""
    if state.config.get("model_type") != "mixtral":
        return state

    def saved(name: str) -> str:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        head, inside, part = name.partition(".experts.")
        return head + inside + re.sub(r"\w+_proj", lambda m: _EXPERT_PARTS[m[0]], part)

    packed = {saved(n): replace(x, name=saved(x.name)) for n, x in state.packed.items()}
    whole = {saved(name): weight for name, weight in state.whole.items()}
    return replace(state, packed=packed, whole=whole)


def _whole(name: str, weight: Weight) -> Entry:
    return Entry(name, weight.dtype, weight.shape, weight.read)


# --- compressed-tensors ---------------------------------------------------------------------------


def _packed_entries(linear: PackedLinear) -> Iterator[Entry]:
    name, rows, groups, bits = linear.name, linear.rows, linear.groups, linear.bits
    if linear.group and linear.columns % linear.group:
        raise BadInput(
            f"{name}: groups of {linear.group} do not divide its {linear.columns} columns, which "
            "compressed-tensors wants"
        )
    width = -(-linear.columns * bits // 32)
    yield Entry(f"{name}.weight_packed", torch.int32, (rows, width),
                lambda: pack_rows(linear.codes(), bits))  # fmt: skip
    yield Entry(f"{name}.weight_scale", linear.stored[1].dtype, (rows, groups), linear.scales)
    yield Entry(f"{name}.weight_shape", torch.int64, (2,),
                lambda: torch.tensor([rows, linear.columns]))  # fmt: skip
    if not linear.symmetric:
        yield Entry(
            f"{name}.weight_zero_point", torch.int32, (-(-rows * bits // 32), groups),
            lambda: pack_rows(linear.zeros().T.contiguous(), bits).T.contiguous(),
        )  # fmt: skip


def _packed_config(state: ModelState) -> dict[str, Any]:
    forms: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    for linear in state.packed.values():
        forms[linear.bits, linear.group, linear.symmetric].append(linear.name)
    groups: dict[str, Any] = {}
    for number, ((bits, group, symmetric), names) in enumerate(forms.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(forms) == 1 else names, "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "group" if group else "channel", "group_size": group or None,
                "actorder": None, "block_structure": None, "observer": "minmax",
                "observer_kwargs": {},
            },
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": groups,
        "ignore": _left_whole(state), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _left_whole(state: ModelState) -> list[str]:
    """Modules of linears that are not quantized: matrices that no table is, and a tied head."""
    tables = re.compile(r"embed|wte|wpe")
    names = [n.removesuffix(".weight") for n, w in state.whole.items()
             if len(w.shape) == 2 and not tables.search(n)]  # fmt: skip
    return names if "lm_head" in (*names, *state.packed) else [*names, "lm_head"]


# --- GPTQ -----------------------------------------------------------------------------------------


def _rows_whole(state: ModelState) -> ModelState:
    """The state with linears of one row as numbers: the gate of a shared expert is no module that
    GPTQModel packs, or looks for codes of."""
    rows = {name: linear for name, linear in state.packed.items() if linear.rows == 1}
    packed = {name: linear for name, linear in state.packed.items() if name not in rows}
    numbers = {f"{linear.name}.weight": linear.weight() for linear in rows.values()}
    return replace(state, packed=packed, whole={**state.whole, **numbers})


def _gptq_entries(linear: PackedLinear) -> Iterator[Entry]:
    name, bits, rows, columns = linear.name, linear.bits, linear.rows, linear.columns
    if columns % 32 or rows % 32:
        raise BadInput(f"{name} is {rows} x {columns}, and GPTQ packs multiples of 32 both ways")
    group, middle = linear.group or columns, 1 if linear.symmetric else 0

    def scales() -> Tensor:
        narrow = linear.scales().to(torch.float16)
        if not bool(narrow.isfinite().all()):
            raise BadInput(f"{name}: a scale is beyond float16, in which GPTQ stores them")
        return narrow.T.contiguous()

    def zeros() -> Tensor:
        return pack_rows((linear.zeros() - middle).T.contiguous(), bits)

    yield Entry(f"{name}.qweight", torch.int32, (columns * bits // 32, rows),
                lambda: pack_rows(linear.codes(), bits).T.contiguous())  # fmt: skip
    yield Entry(f"{name}.qzeros", torch.int32, (linear.groups, rows * bits // 32), zeros)
    yield Entry(f"{name}.scales", torch.float16, (linear.groups, rows), scales)
    yield Entry(f"{name}.g_idx", torch.int32, (columns,),
                lambda: torch.arange(columns, dtype=torch.int32) // group)  # fmt: skip


def _gptq_config(state: ModelState) -> dict[str, Any]:
    linears = list(state.packed.values())
    if len({x.symmetric for x in linears}) > 1:
        raise BadInput("some linears are symmetric and others not, which one GPTQ folder is not")
    forms = [(x.bits, x.group or -1) for x in linears]
    bits, group = max(forms, key=forms.count)
    others = {
        f"+:^{re.escape(x.name)}$": {"bits": x.bits, "group_size": x.group or -1}
        for x in linears if (x.bits, x.group or -1) != (bits, group)
    }  # fmt: skip
    excluded: dict[str, Any] = {
        f"-:^{re.escape(n)}$": {} for n in _left_whole(state) if n != "lm_head"
    }
    kind = "gptq" if linears[0].symmetric else "gptq_v2"
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": linears[0].symmetric,
        "desc_act": False, "lm_head": "lm_head" in state.packed, "checkpoint_format": kind,
        "pack_dtype": "int32", **({"dynamic": others | excluded} if others or excluded else {}),
    }  # fmt: skip
