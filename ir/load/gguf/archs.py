"""GGUF's architectures: what their tensors are called in transformers, and how they differ.

Names and order as llama.cpp writes and runs them (``convert_hf_to_gguf.py``, ``llama-model.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.weights import Weight
from . import gpt_oss

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ROUTED = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj", "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
"""Experts lie in one tensor: ``{}`` is the number of each."""
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """What differs between architectures."""

    model: str
    """transformers' class of it."""
    model_type: str
    own: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a block beside the usual ones, or instead."""
    routed: bool = False
    """Whether a block has experts."""
    permuted: bool = False
    gemma: bool = False
    yarn: Mapping[str, Any] | None = None
    """What its YaRN has beside what a file says; ``None`` where none is read."""
    experts: Callable[[Any, int], dict[str, Any]] | None = None
    """Its config of experts by a file's keys and the size of its feed-forward, where that is not
    the usual."""
    renamed: Callable[[Mapping[str, Weight]], dict[str, Weight]] | None = None
    """Its tensors as transformers has them, where those are others."""

    @property
    def names(self) -> Mapping[str, str]:
        """Paths of modules in a block by the names of their tensors."""
        usual = {**_ATTENTION, **(_ROUTED if self.routed else _DENSE), **self.own}
        # One that another name stands for is not there.
        own = set(self.own.values())
        return {name: path for name, path in usual.items()
                if name in self.own or path not in own}  # fmt: skip


_SINKS = {
    "post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
}  # fmt: skip
ARCHS = {
    "llama": Arch("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Arch("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Arch("Qwen3ForCausalLM", "qwen3", _NORMED_HEADS),
    "gemma": Arch("GemmaForCausalLM", "gemma", gemma=True),
    "gemma2": Arch("Gemma2ForCausalLM", "gemma2", _FOUR_NORMS, gemma=True),
}  # fmt: skip
ROUTED = {
    "llama": Arch("MixtralForCausalLM", "mixtral", routed=True, permuted=True),
    "qwen2moe": Arch("Qwen2MoeForCausalLM", "qwen2_moe", _SHARED, routed=True),
    "qwen3moe": Arch("Qwen3MoeForCausalLM", "qwen3_moe", _NORMED_HEADS, routed=True),
    "gpt-oss": Arch(
        "GptOssForCausalLM", "gpt_oss", _SINKS, routed=True, yarn=gpt_oss.YARN,
        experts=gpt_oss.settings, renamed=gpt_oss.by_its_names,
    ),
}
"""Those of files with experts."""
