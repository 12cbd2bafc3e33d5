"""GGUF models as checkpoints: their config, their tensors by transformers' names, their tokenizer.

Read as llama.cpp writes and runs them (``convert_hf_to_gguf.py``, ``llama-model.cpp``). Of arch
``llama`` the rows of q and k are interleaved for its rotary embedding; they are put back, which
moves whole rows. Gemma's norms are stored with the 1 that its code adds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput, Missing, first_line
from ..core.quiet import quiet
from ..core.weights import ComputedWeight, Weight
from .checkpoint import Checkpoint
from .gguf_blocks import KINDS, parts
from .gguf_file import KINDS as TYPES
from .gguf_file import WHOLE, GgufFile, Tensor

_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FACTORS = "rope_freqs.weight"
MOST_PLACES = 1 << 24
"""Of a text: rotary embeddings count them in float32, which is exact up to there."""


@dataclass(frozen=True)
class Arch:
    """What differs between architectures."""

    model: str
    """transformers' class of it."""
    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a block beside the usual ones, or instead."""
    permuted: bool = False
    gemma: bool = False
    head_dim: int | None = None
    """Where the file does not say: 256 of Gemma's, else hidden over heads."""


ARCHS = {
    "llama": Arch("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Arch("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Arch("Qwen3ForCausalLM", "qwen3", _NORMED_HEADS),
    "gemma": Arch("GemmaForCausalLM", "gemma", gemma=True),
    "gemma2": Arch("Gemma2ForCausalLM", "gemma2", _FOUR_NORMS, gemma=True),
}  # fmt: skip


def config_of(file: GgufFile) -> dict[str, Any]:
    """``config.json`` of the file's model. Raises ``BadInput`` for an architecture that is not
    read, and for keys that are absent or wrong."""
    arch = _arch(file)
    keys = _Keys(file)
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head = keys.whole("attention.key_length", hidden // heads)
    words = file.tensors.get("token_embd.weight")
    if words is None or len(words.shape) != 2:
        raise BadInput(f"{file.path}: no tensor token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [arch.model], "model_type": arch.model_type, "dtype": "float32",
        "hidden_size": hidden, "num_hidden_layers": keys.whole("block_count"),
        "intermediate_size": keys.whole("feed_forward_length"), "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads), "head_dim": head,
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.whole("context_length", most=MOST_PLACES),
        "vocab_size": words.shape[0],
        "rope_parameters": _rope(file, keys, head),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }  # fmt: skip
    if keys.whole("rope.dimension_count", head) != head:
        raise BadInput(f"{file.path}: {file.arch}.rope.dimension_count is not the size of a head")
    if keys.whole("attention.value_length", head) != head:
        raise BadInput(f"{file.path}: {file.arch}.attention.value_length is not that of the keys")
    for name, default in (("bos", 1), ("eos", 2), ("padding", None)):
        token = file.keys.get(f"tokenizer.ggml.{name}_token_id", default)
        config[f"{name.replace('padding', 'pad')}_token_id"] = token
    if arch.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch.gemma:
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if arch.model_type == "gemma2":
        # llama.cpp goes by the number of layers: the 27B model scales by another size.
        wide = config["num_hidden_layers"] == 46
        config |= {
            "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
            "sliding_window": keys.whole("attention.sliding_window", 4096),
            "query_pre_attn_scalar": hidden // heads if wide else head,
        }
    return config


def checkpoint_of(file: GgufFile, config: Mapping[str, Any]) -> Checkpoint:
    """The tensors by the names that transformers gives them. Raises ``BadInput`` where one has a
    shape that the header's sizes contradict, or no place in the model."""
    arch = _arch(file)
    tensors: dict[str, Weight] = {}
    kinds: dict[str, int] = {}
    dense: list[str] = []
    for name, tensor in file.tensors.items():
        if name == _FACTORS:
            continue
        path, end = _place(file, arch, name)
        _check_shape(file, tensor, path, config)
        order = _order(arch, path, tensor.shape[0], config)
        tensors[f"{path}.{end}"] = _weight(file, tensor, order, arch, dense)
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    _check_whole(file, arch, config["num_hidden_layers"])
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


def _arch(file: GgufFile) -> Arch:
    if file.arch not in ARCHS:
        raise BadInput(f"{file.path}: architecture {file.arch!r}; {', '.join(ARCHS)} are read")
    if file.keys.get(f"{file.arch}.expert_count", 0):
        raise BadInput(f"{file.path}: {file.arch}.expert_count: experts of a GGUF are not read")
    return ARCHS[file.arch]


@dataclass(frozen=True)
class _Keys:
    file: GgufFile

    def whole(self, name: str, other: int | None = None, most: int | None = None) -> int:
        number = self._get(name, other)
        if type(number) is not int or number < 1:
            raise BadInput(f"{self.file.path}: {self.file.arch}.{name} is {number!r}, not a number "
                           "above 0")  # fmt: skip
        if most is not None and number > most:
            raise BadInput(f"{self.file.path}: {self.file.arch}.{name} is {number}; at most {most} "
                           "are read")  # fmt: skip
        return number

    def real(self, name: str, other: float | None = None) -> float:
        number = self._get(name, other)
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise BadInput(f"{self.file.path}: {self.file.arch}.{name} is {number!r}, not a number "
                           "above 0")  # fmt: skip
        return float(number)

    def _get(self, name: str, other: Any) -> Any:
        entry = self.file.keys.get(f"{self.file.arch}.{name}", other)
        if entry is None:
            raise BadInput(f"{self.file.path}: no key {self.file.arch}.{name}")
        return entry


# --- rotary embedding ----------------------------------------------------------------------------


def _rope(file: GgufFile, keys: _Keys, head: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)
    }  # fmt: skip
    scaling = file.keys.get(f"{file.arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise BadInput(f"{file.path}: {file.arch}.rope.scaling.type {scaling!r}; linear is read")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    factors = file.tensors.get(_FACTORS)
    return rope if factors is None else _llama3(file, factors, rope, head)


def _llama3(file: GgufFile, factors: Tensor, base: dict[str, Any], head: int) -> dict[str, Any]:
    """Llama 3's scaling, of which the file holds the outcome: the factors of each frequency."""
    stored = factors.data.read().float()
    for factor in (8.0, 32.0):
        rope = base | {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}  # fmt: skip
        expected = _llama3_factors(rope, head)
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-4):
            return rope
    raise BadInput(f"{file.path}: {_FACTORS} holds factors other than those of Llama 3")


def _llama3_factors(rope: Mapping[str, Any], head: int) -> torch.Tensor:
    """As ``convert_hf_to_gguf.py`` computes them."""
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    low, high, old = (rope[name] for name in (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))  # fmt: skip
    smooth = (old / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = torch.where(lengths > old / low, rope["factor"], between)
    return torch.where(lengths < old / high, 1.0, factors).float()


# --- tensors -------------------------------------------------------------------------------------


def _place(file: GgufFile, arch: Arch, name: str) -> tuple[str, str]:
    """The path of its module and ``weight`` or ``bias``."""
    stem, _, end = name.rpartition(".")
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    path = _OUTER.get(stem)
    if inner is not None:
        part = {**_BLOCK, **arch.names}.get(inner[2])
        path = None if part is None else f"model.layers.{inner[1]}.{part}"
    if path is None or end not in ("weight", "bias"):
        raise BadInput(f"{file.path}: the tensor {name!r} has no place in arch {file.arch}")
    return path, end


def _check_whole(file: GgufFile, arch: Arch, blocks: int) -> None:
    for block in range(blocks):
        for part in {**_BLOCK, **arch.names}:
            name = f"blk.{block}.{part}.weight"
            if name not in file.tensors:
                raise BadInput(f"{file.path}: no tensor {name!r}, and {file.arch}.block_count is "
                               f"{blocks}")  # fmt: skip


def _check_shape(file: GgufFile, tensor: Tensor, path: str, config: Mapping[str, Any]) -> None:
    hidden, inner, head = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    sizes = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
        "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner), "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden), "q_norm": (head,), "k_norm": (head,),
    }  # fmt: skip
    expected = sizes.get(path.rpartition(".")[2], (hidden,))
    expected = expected[:1] if tensor.name.endswith(".bias") else expected
    if tensor.shape != expected:
        raise BadInput(f"{file.path}: the tensor {tensor.name!r} is {list(tensor.shape)}; by the "
                       f"keys of arch {file.arch} it is {list(expected)}")  # fmt: skip
    words = file.keys.get("tokenizer.ggml.tokens")
    if path == "model.embed_tokens" and words is not None and len(words) > expected[0]:
        raise BadInput(f"{file.path}: {len(words)} of tokenizer.ggml.tokens, and "
                       f"{tensor.name!r} has {expected[0]} rows")  # fmt: skip


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
