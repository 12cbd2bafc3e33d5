"""The config of a GGUF file's model, from the keys of its header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import BadInput
from .archs import ARCHS, ROUTED, Arch
from .file import GgufFile, Tensor

FACTORS = "rope_freqs.weight"
MOST_PLACES = 1 << 24
"""Of a text: rotary embeddings count them in float32, which is exact up to there."""


def config_of(file: GgufFile) -> dict[str, Any]:
    """``config.json`` of the file's model. Raises ``BadInput`` for an architecture that is not
    read, and for keys that are absent or wrong."""
    arch = arch_of(file)
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
        "rope_parameters": _rope(file, arch, keys, head),
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
    if arch.routed:
        config |= _experts(arch, keys, config["intermediate_size"])
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


def _experts(arch: Arch, keys: _Keys, inner: int) -> dict[str, Any]:
    """The config of a layer of experts, with what llama.cpp takes where the file does not say."""
    if arch.experts is not None:
        return arch.experts(keys, inner)
    count = keys.whole("expert_count")
    picked = keys.whole("expert_used_count", most=count)
    if arch.model_type == "mixtral":
        return {"num_local_experts": count, "num_experts_per_tok": picked}
    config: dict[str, Any] = {
        "num_experts": count, "num_experts_per_tok": picked, "mlp_only_layers": [],
        "moe_intermediate_size": keys.whole("expert_feed_forward_length", inner // picked),
        "decoder_sparse_step": 1, "norm_topk_prob": arch.model_type == "qwen3_moe",
    }  # fmt: skip
    if arch.model_type == "qwen2_moe":
        shared = keys.whole("expert_shared_feed_forward_length", inner)
        config["shared_expert_intermediate_size"] = shared
    return config


def arch_of(file: GgufFile) -> Arch:
    count = file.keys.get(f"{file.arch}.expert_count", 0)
    arch = ROUTED.get(file.arch) if count else ARCHS.get(file.arch, ROUTED.get(file.arch))
    if arch is not None:
        return arch
    if file.arch in ARCHS:
        raise BadInput(f"{file.path}: {file.arch}.expert_count is {count}: experts of "
                       f"{', '.join(ROUTED)} are read")  # fmt: skip
    known = ", ".join(ARCHS | ROUTED)
    raise BadInput(f"{file.path}: architecture {file.arch!r}; {known} are read")


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


def _rope(file: GgufFile, arch: Arch, keys: _Keys, head: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)
    }  # fmt: skip
    scaling = file.keys.get(f"{file.arch}.rope.scaling.type", "none")
    if scaling == "yarn" and arch.yarn is not None:
        return rope | {
            **arch.yarn, "rope_type": "yarn", "factor": keys.real("rope.scaling.factor"),
            "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
        }  # fmt: skip
    if scaling not in ("none", "linear"):
        raise BadInput(f"{file.path}: {file.arch}.rope.scaling.type {scaling!r}; linear is read")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    factors = file.tensors.get(FACTORS)
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
    raise BadInput(f"{file.path}: {FACTORS} holds factors other than those of Llama 3")


def _llama3_factors(rope: Mapping[str, Any], head: int) -> torch.Tensor:
    """As ``convert_hf_to_gguf.py`` computes them."""
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    low, high, old = (rope[name] for name in (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))  # fmt: skip
    smooth = (old / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = torch.where(lengths > old / low, rope["factor"], between)
    return torch.where(lengths < old / high, 1.0, factors).float()
