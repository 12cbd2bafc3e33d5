"""GGUF for llama.cpp: Q4_0 of linears and tables of 2 to 4 bits, Q8_0 or MXFP4 of 8, the rest
whole.

A block is 32 columns, a float16 scale and codes; ``W = d (q - 8)`` and ``d q``. Symmetric codes in
groups of 32 or more are the same numbers there. Names come from the package ``gguf``; of arch
``llama`` the rows of q and k are put in the order that its rotary embedding wants, which moves
whole rows (``convert_hf_to_gguf.py``, ``LlamaModel.permute``). The experts of a layer lie in one
tensor, gate, up and down apart. Gemma's norms are stored there with
the 1 that its code adds, which the file's readers do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.core.weights import Weight
from . import gguf_gpt_oss, gguf_mxfp4
from .gguf_experts import Tensor, add_settings, check_experts, stack_name, stacked
from .model_state import ModelState, PackedLinear, narrowed, read_state

FILE = "model.gguf"
BLOCK = 32
ARCHS = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gemma": "gemma", "gemma2": "gemma2",
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
    gguf_gpt_oss.GPT_OSS: "gpt-oss",
}  # fmt: skip
"""GGUF's names of the model types that are written."""
_GEMMA = ("gemma", "gemma2")
_PRE = {
    "llama": "llama-bpe", gguf_gpt_oss.GPT_OSS: "gpt-4o",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3_moe"), "qwen2"),
}  # fmt: skip
"""How words are parted before they are merged, where not by default."""


def write_gguf(artifact: Path, out: Path) -> list[str]:
    """Write ``model.gguf``; what a person should know.

    Raises ``Missing`` without the package ``gguf`` and ``BadInput`` for an architecture that is not
    written, rotary scaling, and linears that no block type is equal to.
    """
    try:
        import gguf
    except ImportError:
        raise Missing("GGUF needs the package gguf: pip install 'graphwright[gguf]'") from None
    state = read_state(artifact)
    if state.paths:
        raise BadInput("low-rank paths are not in a GGUF file: --to peft writes them")
    config = state.config
    arch = ARCHS.get(str(config.get("model_type")))
    if arch is None:
        raise BadInput(f"model_type {config.get('model_type')!r}; {', '.join(ARCHS)} are written")
    if arch in _GEMMA:
        _check_gemma(config)
    check_experts(config)
    writer = gguf.GGUFWriter(None, arch)
    notes = _settings(writer, config, state)
    _tokenizer(writer, artifact, config)
    known = gguf.MODEL_ARCH[arch.upper().replace("-", "_")]
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    if config["model_type"] == gguf_gpt_oss.GPT_OSS:
        state = gguf_gpt_oss.by_the_files_names(state)
    tensors = [_named(tensor, names) for tensor in stacked(_tensors(state, arch))]
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.uint8)
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, kind)
    writer.write_header_to_file(out / FILE)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.make())
    writer.close()
    kinds = [tensor.kind for tensor in tensors]
    counts = ", ".join(f"{kinds.count(k)} tensors {k}" for k in sorted({*kinds}))
    return [f"{FILE}: {counts}", *notes]


def _named(tensor: Tensor, names: Any) -> Tensor:
    name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise BadInput(f"{tensor.name} has no place in a GGUF file of this architecture")
    return replace(tensor, name=name)


def _tensors(state: ModelState, arch: str) -> Iterator[Tensor]:
    mxfp4 = _mxfp4(state)
    for name, linear in state.packed.items():
        order = _rows(name, linear.rows, state.config, arch)
        yield _mxfp4_blocks(linear, order) if stack_name(name) in mxfp4 else _blocks(linear, order)
    for name, weight in state.whole.items():
        module = name.rpartition(".")[0]
        table = state.tables.get(name)
        if table is not None and _reason(table) is None:
            yield _blocks(table, None)
            continue
        added = 1.0 if arch in _GEMMA and module.endswith("norm") else 0.0
        yield _whole(name, weight, _rows(module, weight.shape[0], state.config, arch), added)


def _rows(name: str, rows: int, config: Mapping[str, Any], arch: str) -> torch.Tensor | None:
    """The order of the rows of q and k of arch llama: each head's halves interleaved."""
    part = name.rpartition(".")[2]
    if arch != "llama" or part not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads"]
    heads = heads if part == "q_proj" else config.get("num_key_value_heads") or heads
    return torch.arange(rows).view(heads, 2, rows // heads // 2).mT.reshape(-1)


def _reason(linear: PackedLinear) -> str | None:
    """Why it does not lie in blocks of Q4_0 or Q8_0; ``None`` where it does."""
    if not linear.symmetric or linear.stored[1].dtype != torch.float16:
        return "Q4_0 and Q8_0 are symmetric with float16 scales, and it is not"
    if linear.columns % BLOCK or (linear.group and linear.group % BLOCK):
        return f"groups of {linear.group} of {linear.columns} columns are no blocks of {BLOCK}"
    return None


def _blocks(linear: PackedLinear, order: torch.Tensor | None) -> Tensor:
    name, rows, columns = linear.name, linear.rows, linear.columns
    reason = _reason(linear)
    if reason is not None:
        raise BadInput(f"{name}: {reason}")
    kind, width = ("Q8_0", 32) if linear.bits == 8 else ("Q4_0", 16)
    blocks = columns // BLOCK

    def make() -> np.ndarray[Any, Any]:
        codes, scales = linear.codes(), linear.scales()
        if order is not None:
            codes, scales = codes[order], scales[order]
        signed = (codes.to(torch.int16) - (1 << (linear.bits - 1))).view(rows, blocks, BLOCK)
        times = (linear.group or columns) // BLOCK
        wide = scales.repeat_interleave(times, 1)[:, :blocks].contiguous()
        if linear.bits == 8:
            data = signed.to(torch.int8).view(torch.uint8)
        else:
            nibbles = (signed + 8).to(torch.uint8)
            data = nibbles[..., :16] | (nibbles[..., 16:] << 4)
        packed = torch.cat([wide.unsqueeze(-1).view(torch.uint8), data], -1)
        return packed.flatten(1).numpy()

    return Tensor(f"{name}.weight", kind, (rows, blocks * (width + 2)), make)


def _mxfp4(state: ModelState) -> set[str]:
    """Linears, and experts of a layer together, that are MXFP4 as they are."""
    stacks: dict[str, bool] = {}
    for name, linear in state.packed.items():
        stack = stack_name(name)
        stacks[stack] = stacks.get(stack, True) and gguf_mxfp4.fits(linear)
    return {name for name, fits in stacks.items() if fits}


def _mxfp4_blocks(linear: PackedLinear, order: torch.Tensor | None) -> Tensor:
    def make() -> np.ndarray[Any, Any]:
        blocks = gguf_mxfp4.blocks(linear)
        return (blocks if order is None else blocks[order]).numpy()

    size = linear.columns // gguf_mxfp4.BLOCK * gguf_mxfp4.BYTES
    return Tensor(f"{linear.name}.weight", "MXFP4", (linear.rows, size), make)


def _whole(name: str, weight: Weight, order: torch.Tensor | None, added: float) -> Tensor:
    """float32 for what is not a matrix, as llama.cpp wants it; matrices in the dtype that they
    have, or the half of it that holds their numbers. ``added``: to each of its numbers."""
    kind = "F32"
    if len(weight.shape) == 2:
        narrow = narrowed(weight, torch.bfloat16)
        kind, weight = ("BF16", narrow) if narrow.dtype == torch.bfloat16 else (kind, weight)
        kind = "F16" if weight.dtype == torch.float16 else kind
    final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]

    def make() -> np.ndarray[Any, Any]:
        tensor = (weight.read() + added).to(final) if added else weight.read().to(final)
        tensor = (tensor if order is None else tensor[order]).contiguous()
        return tensor.numpy() if kind == "F32" else tensor.view(torch.uint8).numpy()

    shape = weight.shape if kind == "F32" else (*weight.shape[:-1], weight.shape[-1] * 2)
    return Tensor(name, kind, shape, make)


def _settings(writer: Any, config: Mapping[str, Any], state: ModelState) -> list[str]:
    """Write the keys; what a person should know of them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    own = config["model_type"] == gguf_gpt_oss.GPT_OSS
    if scaled not in ("default", *(["yarn"] if own else [])):
        raise BadInput(f"rotary scaling {scaled!r} is not written")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_vocab_size(config["vocab_size"])
    add_settings(writer, config)
    notes = gguf_gpt_oss.add_settings(writer, config, rope) if own else []
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    if head != hidden // heads:
        writer.add_key_length(head)
        writer.add_value_length(head)
    eight = any(linear.bits == 8 for linear in state.packed.values())
    writer.add_file_type(7 if eight else 2)  # mostly Q8_0, mostly Q4_0
    writer.add_quantization_version(2)
    return notes


def _check_gemma(config: Mapping[str, Any]) -> None:
    """What llama.cpp takes for granted of Gemma. Raises ``BadInput`` for another."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    wide = config["num_hidden_layers"] == 46  # by which llama.cpp knows the model of 27B
    scaled = hidden // heads if wide else config["head_dim"]
    for name, expected in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("query_pre_attn_scalar", scaled),
    ):
        setting = config.get(name)
        if setting not in (None, expected):
            raise BadInput(
                f"{name} is {setting!r} in config.json; a GGUF file of Gemma has {expected!r}"
            )


def _tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """The vocabulary of a byte-level BPE; of other tokenizers none, so that ids are given."""
    path = folder / "tokenizer.json"
    known = json.loads(path.read_bytes()) if path.is_file() else {}
    model = known.get("model", {})
    if model.get("type") != "BPE" or not any(
        part.get("type") == "ByteLevel" for part in _steps(known.get("decoder") or {})
    ):
        writer.add_tokenizer_model("none")
        return
    words = {place: word for word, place in model["vocab"].items()}
    special = {entry["id"]: entry for entry in known.get("added_tokens", ())}
    words |= {place: entry["content"] for place, entry in special.items()}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE.get(config["model_type"], "default"))
    writer.add_token_list([words.get(place, f"[PAD{place}]") for place in range(size)])
    writer.add_token_types([
        (3 if special[place].get("special") else 4) if place in special
        else 1 if place in words else 5 for place in range(size)
    ])  # fmt: skip
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("pad", writer.add_pad_token_id)):  # fmt: skip
        token = config.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            add(token)


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [decoder, *decoder.get("decoders", ())]
