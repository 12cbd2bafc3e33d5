"""GGUF models as checkpoints: their tensors by transformers' names, and their tokenizer.

Read as llama.cpp writes and runs them (``convert_hf_to_gguf.py``, ``llama-model.cpp``). Of arch
``llama`` the rows of q and k are interleaved for its rotary embedding; they are put back, which
moves whole rows. Gemma's norms are stored with the 1 that its code adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...core.errors import BadInput, Missing, first_line
from ...core.quiet import quiet
from ...core.weights import ComputedWeight, Weight
from ..checkpoints.checkpoint import Checkpoint
from .archs import OUTER, Arch
from .blocks import KINDS, parts
from .config import FACTORS, arch_of
from .file import KINDS as TYPES
from .file import WHOLE, GgufFile, Tensor


def checkpoint_of(file: GgufFile, config: Mapping[str, Any]) -> Checkpoint:
    """The tensors by the names that transformers gives them. Raises ``BadInput`` where one has a
    shape that the header's sizes contradict, or no place in the model."""
    arch = arch_of(file)
    tensors: dict[str, Weight] = {}
    kinds: dict[str, int] = {}
    dense: list[str] = []
    for name, tensor in file.tensors.items():
        if name == FACTORS:
            continue
        path, end = _place(file, arch, name)
        tensor = _with_rows(tensor, path)
        _check_shape(file, tensor, path, config)
        order = _order(arch, path, tensor.shape[0], config)
        for index, one in enumerate(_each(tensor, path)):
            place = f"{path.format(index)}.{end}"
            tensors[place] = _weight(file, one, order, arch, dense)
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    _check_whole(file, arch, config["num_hidden_layers"])
    if arch.renamed is not None:
        try:
            tensors = arch.renamed(tensors)
        except BadInput as error:
            raise BadInput(f"{file.path}: {error}") from None
    summary = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
    notes = [f"GGUF of arch {file.arch}, taken as it is stored: {summary}"]
    if dense:
        notes.append(f"read as dense numbers, for no form of ours is equal to their type: "
                     f"{len(dense)} tensors, such as {dense[0]}")  # fmt: skip
    return Checkpoint(tensors, (file.path,), tuple(notes))


def write_tokenizer(file: GgufFile, folder: Path) -> str:
    """Write what transformers makes of the file's tokenizer; why it made none, or nothing."""
    if file.keys.get("tokenizer.ggml.model", "none") == "none":
        return "it holds no tokenizer"
    try:
        from transformers import AutoTokenizer

        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name,
                                                 local_files_only=True)  # fmt: skip
            tokenizer.save_pretrained(folder)
    except Exception as error:
        # The library goes by what the file says, and raises errors of any kind.
        return f"transformers makes no tokenizer of it: {first_line(error)}"
    return ""


# --- tensors -------------------------------------------------------------------------------------


def _place(file: GgufFile, arch: Arch, name: str) -> tuple[str, str]:
    """The path of its module and ``weight`` or ``bias``."""
    stem, _, end = name.rpartition(".")
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    path = OUTER.get(stem)
    if inner is not None:
        part = arch.names.get(inner[2])
        path = None if part is None else f"model.layers.{inner[1]}.{part}"
    if path is None or end not in ("weight", "bias"):
        raise BadInput(f"{file.path}: the tensor {name!r} has no place in arch {file.arch}")
    return path, end


def _check_whole(file: GgufFile, arch: Arch, blocks: int) -> None:
    for block in range(blocks):
        for part in arch.names:
            name = f"blk.{block}.{part}.weight"
            if name not in file.tensors:
                raise BadInput(f"{file.path}: no tensor {name!r}, and {file.arch}.block_count is "
                               f"{blocks}")  # fmt: skip


def _check_shape(file: GgufFile, tensor: Tensor, path: str, config: Mapping[str, Any]) -> None:
    hidden, head, inner = config["hidden_size"], config["head_dim"], _inner(path, config)
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    experts = config.get("num_experts", config.get("num_local_experts"))
    sizes = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
        "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner), "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden), "q_norm": (head,), "k_norm": (head,),
        "gate": (experts, hidden), "router": (experts, hidden), "shared_expert_gate": (1, hidden),
        "sinks": (config["num_attention_heads"],),
    }  # fmt: skip
    expected = sizes.get(path.rpartition(".")[2], (hidden,))
    expected = expected[:1] if tensor.name.endswith(".bias") else expected
    expected = (experts, *expected) if "{}" in path else expected
    if tensor.shape != expected:
        raise BadInput(f"{file.path}: the tensor {tensor.name!r} is {list(tensor.shape)}; by the "
                       f"keys of arch {file.arch} it is {list(expected)}")  # fmt: skip
    words = file.keys.get("tokenizer.ggml.tokens")
    if path == "model.embed_tokens" and words is not None and len(words) > expected[0]:
        raise BadInput(f"{file.path}: {len(words)} of tokenizer.ggml.tokens, and "
                       f"{tensor.name!r} has {expected[0]} rows")  # fmt: skip


def _inner(path: str, config: Mapping[str, Any]) -> int:
    """Of the feed-forward that a path is of."""
    inner: int = config["intermediate_size"]
    if ".experts." in path:
        return int(config.get("moe_intermediate_size", inner))
    return int(config["shared_expert_intermediate_size"]) if ".shared_expert." in path else inner


def _with_rows(tensor: Tensor, path: str) -> Tensor:
    """The gate of a shared expert is a matrix of one row, which a file need not say."""
    if not path.endswith("shared_expert_gate") or len(tensor.shape) != 1:
        return tensor
    row = tensor.data.part(0, (1, tensor.data.numel))
    return replace(tensor, shape=(1, *tensor.shape), data=row)


def _each(tensor: Tensor, path: str) -> Iterator[Tensor]:
    """The tensor, or each of the experts that lie in it."""
    if "{}" not in path:
        yield tensor
        return
    count, *sizes = tensor.shape
    size = tensor.data.numel // count
    for index in range(count):
        shape = (sizes[0], size // sizes[0]) if len(sizes) > 1 else (size,)
        yield replace(tensor, shape=tuple(sizes), data=tensor.data.part(index * size, shape))


def _order(arch: Arch, path: str, rows: int, config: Mapping[str, Any]) -> torch.Tensor | None:
    """Where each row of q and k is in the file: there, the halves of a head are interleaved."""
    part = path.rpartition(".")[2]
    if not arch.permuted or part not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
    return torch.arange(rows).view(heads, rows // heads // 2, 2).mT.reshape(-1)


def _weight(file: GgufFile, tensor: Tensor, order: torch.Tensor | None, arch: Arch,
            dense: list[str]) -> Weight:  # fmt: skip
    data = tensor.data
    if tensor.kind not in WHOLE and len(tensor.shape) != 2:
        raise BadInput(f"{file.path}: the tensor {tensor.name!r} is {list(tensor.shape)} of "
                       f"{tensor.kind}: matrices alone are read in blocks")  # fmt: skip
    if tensor.kind in KINDS:
        rows, columns = tensor.shape
        block = next(size for name, size, _ in TYPES.values() if name == tensor.kind)
        quantized = parts(tensor.name, KINDS[tensor.kind], (rows, columns), data, block, order)
        return quantized.weight()
    if tensor.kind not in WHOLE:
        dense.append(f"{tensor.name} ({tensor.kind})")
        return _of_library(file, tensor, order)
    less = 1 if arch.gemma and tensor.name.endswith("norm.weight") else 0
    if order is None and not less:
        return data
    return ComputedWeight(
        lambda: (data.read() if order is None else data.read()[order]) - less,
        tensor.shape, data.dtype, (data.key, less),
    )  # fmt: skip


def _of_library(file: GgufFile, tensor: Tensor, order: torch.Tensor | None) -> Weight:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise Missing(
            f"{file.path}: the tensor {tensor.name!r} is of type {tensor.kind}, which needs the "
            "package gguf: pip install 'graphwright[gguf]'"
        ) from None

    def make() -> torch.Tensor:
        raw = tensor.data.read()
        raw = raw if order is None else raw[order]
        kind = GGMLQuantizationType[tensor.kind]
        return torch.from_numpy(quants.dequantize(raw.numpy(), kind)).view(tensor.shape)

    return ComputedWeight(make, tensor.shape, torch.float32, tensor.data.key)
