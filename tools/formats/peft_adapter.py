"""Low-rank paths as a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

``W + (alpha / r) B A`` with ``alpha = r``: the factors as they are. gptqmodel reads the same two
files as EoRA's.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...ir.core.errors import BadInput
from .model_state import ModelState, read_state
from .safetensors_file import Entry, write


def write_adapter(artifact: Path, out: Path) -> list[str]:
    """The paths of an artifact. Raises ``BadInput`` where it has none."""
    state = read_state(artifact)
    if not state.paths:
        raise BadInput(f"{artifact} has no low-rank path: make it with eora")
    return write_paths(state, out)


def write_paths(state: ModelState, out: Path) -> list[str]:
    """Write both files; what a person should know. Raises ``BadInput`` for a path beside an expert
    of a stack, which PEFT knows by no name."""
    for name in sorted(state.stacked & {*state.paths}):
        raise BadInput(f"{name} is a part of a stack of experts, beside which PEFT has no path")
    ranks = {name: path.down.shape[0] for name, path in state.paths.items()}
    most = max(ranks.values())
    odd = {name: rank for name, rank in ranks.items() if rank != most}
    entries = []
    for name, path in state.paths.items():
        for letter, factor in (("A", path.down), ("B", path.up)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            entries.append(Entry(key, factor.dtype, tuple(factor.shape), factor.contiguous))
    write(out / "adapter_model.safetensors", entries)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": most, "lora_alpha": most,
        "rank_pattern": odd, "alpha_pattern": odd, "target_modules": sorted(ranks),
        "base_model_name_or_path": "", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "layers_to_transform": None,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return [f"{len(ranks)} low-rank paths as a PEFT adapter of rank {most}"]
