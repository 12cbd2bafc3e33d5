"""The tensors of a checkpoint folder as handles, under a model's own names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput, Missing
from ..core.weights import CastWeight, Weight, read_safetensors_header

INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def read_checkpoint(folder: Path, *, allow_missing: bool = False) -> dict[str, Weight] | None:
    """Handles by name from ``model.safetensors`` or the shards that its index names.

    ``None`` where there are no weights and ``allow_missing`` is set. Raises ``Missing`` for absent
    weights or shards, ``BadInput`` for damaged files and for pickled checkpoints, which are never
    unpickled: unpickling runs whatever code the file holds.
    """
    single = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        return _read_shards(folder, _shards(folder), allow_missing)
    if single.is_file():
        return dict(read_safetensors_header(single))
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return dict(read_safetensors_header(others[0]))
    if others:
        raise BadInput(
            f"{folder}: {len(others)} safetensors files, but neither model.safetensors nor {INDEX} "
            "to say which one counts"
        )
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles and not allow_missing:
        raise BadInput(
            f"{folder}: the weights are pickled ({pickles[0]}), and pickles are never opened: they "
            "can run any code. On a machine where you trust the file, convert it: "
            "AutoModel.from_pretrained(folder).save_pretrained(out) writes safetensors"
        )
    if allow_missing:
        return None
    raise Missing(
        f"{folder}: no weights (model.safetensors or {INDEX}); fetch them, for example with "
        "`hf download ID --local-dir FOLDER`, or use --dry-run, which needs the config only"
    )


def _shards(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        table = json.loads(path.read_text())["weight_map"]
        pairs = {str(key): str(value) for key, value in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: no valid index (a JSON object with weight_map): {error}") from None
    strange = sorted({v for v in pairs.values() if Path(v).name != v})
    if strange:
        raise BadInput(f"{path}: the shard {strange[0]!r} does not lie in the model's folder")
    return pairs


def _read_shards(
    folder: Path, table: Mapping[str, str], allow_missing: bool
) -> dict[str, Weight] | None:
    files = sorted(set(table.values()))
    gone = [name for name in files if not (folder / name).is_file()]
    if gone and allow_missing:
        return None
    if gone:
        raise Missing(
            f"{folder}: {len(gone)} of {len(files)} shards are missing: {', '.join(gone[:5])}; "
            "fetch them, for example with `hf download ID --local-dir FOLDER`"
        )
    handles: dict[str, Weight] = {}
    for name in files:
        tensors = dict(read_safetensors_header(folder / name))
        for key in (k for k, shard in table.items() if shard == name):
            if key not in tensors:
                raise BadInput(f"{folder / name}: no tensor {key!r}, which {INDEX} says is in it")
            handles[key] = tensors[key]
    return handles


def match(model: Any, handles: Mapping[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
    """Handles for the model's parameters and buffers, and the names of parameters that have none.

    Names may differ by the base model's prefix (the checkpoint of ``BertForMaskedLM`` in
    ``BertModel`` and the reverse) and by the renamings that transformers knows for the model. Tied
    parameters share the handle of whichever name the checkpoint has. Raises ``BadInput`` where a
    shape differs.
    """
    table = _renamed(model, handles)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found: dict[str, Weight] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        forms = (name, prefix + name, name.removeprefix(prefix))
        key = next((s for s in forms if s in table), None)
        if key is not None:
            found[name] = _fit(name, table[key], tensor)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(parameters[n]): w for n, w in found.items() if n in parameters}
    for name, parameter in parameters.items():
        if name not in found and id(parameter) in shared:
            found[name] = shared[id(parameter)]
    return found, [n for n in parameters if n not in found]


def _fit(name: str, weight: Weight, tensor: torch.Tensor) -> Weight:
    if weight.shape != tuple(tensor.shape):
        raise BadInput(
            f"the checkpoint's {name!r} is {list(weight.shape)}, the config asks for "
            f"{list(tensor.shape)}"
        )
    return weight if weight.dtype == tensor.dtype else CastWeight(weight, tensor.dtype)


def _renamed(model: Any, handles: Mapping[str, Weight]) -> dict[str, Weight]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    table: dict[str, Weight] = {}
    for key, weight in handles.items():
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        table[key] = weight
    return table


def converts(model: Any) -> bool:
    """Whether transformers rearranges numbers, not only names, when it loads this family."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(t, WeightConverter) for t in get_model_conversion_mapping(model))
