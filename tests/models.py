"""Small transformer models with random weights, each with inputs and the shapes that vary."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from torch.export import Dim

VOCAB = 97
WIDTH = 32


@dataclass(frozen=True)
class Small:
    """A module called by keyword, one example of its inputs, and its dynamic shapes."""

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, Any]


def plain(small: Small) -> View:
    """The model's graph as it is traced. As those of ``traced`` and ``raised``, it is a copy: of
    equal models one is made in a process."""

    def make() -> View:
        module = copy.deepcopy(small.module)  # a test may change its own
        return trace(module, kwargs=small.inputs, dynamic_shapes=small.dynamic_shapes)

    return _once("plain", small, make)


def traced(small: Small) -> View:
    """The model's raised graph of the kind ``fx`` alone."""
    return _once("fx", small, lambda: _canonical(plain(small)))


def raised(small: Small) -> dict[str, View]:
    """The model's raised graphs: ``fx``, and ``onnx`` translated from it."""
    onnx = _once("onnx", small, lambda: _canonical(translated(plain(small))))
    return {"fx": traced(small), "onnx": onnx}


def _canonical(view: View) -> View:
    canonicalize(view)
    return view


_MADE: dict[tuple[str, bytes], View] = {}


def _once(kind: str, small: Small, make: Callable[[], View]) -> View:
    key = (kind, _content(small))
    if key not in _MADE:
        _MADE[key] = make()
    view = _MADE[key].copy()
    view.source = copy.copy(view.source)
    return view


def _content(small: Small) -> bytes:
    """A digest of all that a trace depends on: code, settings, weights, inputs, their shapes."""
    module: Any = small.module
    pick = module.pick.__code__
    digest = hashlib.sha256(repr((
        type(module), type(module.model), pick.co_code, pick.co_consts, pick.co_names,
        small.dynamic_shapes,
    )).encode())  # fmt: skip
    digest.update(module.model.config.to_json_string(use_diff=False).encode())
    for name, tensor in (*module.state_dict().items(), *small.inputs.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def joined(rows: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """The features of all images, which transformers gives image by image, and 5.17 joined."""
    return rows if isinstance(rows, torch.Tensor) else torch.cat(tuple(rows))


class _Adapted(torch.nn.Module):
    """Calls a transformers model by keyword and returns one tensor or a dict of tensors."""

    def __init__(self, model: torch.nn.Module, pick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.pick = pick


class _Text(_Adapted):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.pick(self.model(input_ids=input_ids, attention_mask=attention_mask))


class _Image(_Adapted):
    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.pick(self.model(pixel_values=pixel_values))


def _text(model: torch.nn.Module, pick: Callable[[Any], Any]) -> Small:
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    dims = {0: Dim("batch"), 1: Dim("seq", max=64)}
    module = _Text(_random(model), pick).eval()
    return Small(
        module,
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": dims, "attention_mask": dims},
    )


def _image(model: torch.nn.Module, pick: Callable[[Any], Any]) -> Small:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    module = _Image(_random(model), pick).eval()
    return Small(module, {"pixel_values": pixels}, {"pixel_values": {0: Dim("batch")}})


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases and norm weights among them: a lost one must show."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.1
            center = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(noise + center)
    return model


def llama(layers: int = 2, **changes: Any) -> Small:
    """Grouped-query attention, rotary positions, RMS norms, gated MLP, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_causal(layers), **changes)
    return _text(LlamaForCausalLM(config), lambda o: {"logits": o.logits})


def qwen2(layers: int = 2, **changes: Any) -> Small:
    """As Llama, with biases on q, k, v and the head tied to the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_causal(layers), tie_word_embeddings=True, **changes)
    return _text(Qwen2ForCausalLM(config), lambda o: o.logits)


def gemma2(layers: int = 2, **changes: Any) -> Small:
    """Capped logits of attention and head, a window in every other layer, norms on both sides."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **_causal(layers), head_dim=8, sliding_window=4, query_pre_attn_scalar=10,
        attn_logit_softcapping=1.5, final_logit_softcapping=3.0, **changes,
    )  # fmt: skip
    return _text(Gemma2ForCausalLM(config), lambda o: o.logits)


def _causal(layers: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": WIDTH, "intermediate_size": 56,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "use_cache": False,
    }  # fmt: skip


def gpt2(layers: int = 2, **changes: Any) -> Small:
    """One joined q, k, v projection stored [in, out], learned positions, head tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_embd=WIDTH, n_head=4, vocab_size=VOCAB, n_positions=64, use_cache=False,
        **changes,
    )  # fmt: skip
    return _text(GPT2LMHeadModel(config), lambda o: o.logits)


def opt(layers: int = 2, **changes: Any) -> Small:
    """A stream that is flattened to ``[tokens, width]`` around each feed-forward, relu, biases."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        num_hidden_layers=layers, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=56,
        num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=64, use_cache=False,
        **changes,
    )  # fmt: skip
    return _text(OPTForCausalLM(config), lambda o: o.logits)


def bert(layers: int = 2, **changes: Any) -> Small:
    """Norms after the additions, erf gelu, a pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=56,
        vocab_size=VOCAB, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return _text(
        BertModel(config),
        lambda o: {"last_hidden_state": o.last_hidden_state, "pooled": o.pooler_output},
    )


def albert(layers: int = 3, **changes: Any) -> Small:
    """One block's weights for all blocks."""
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        num_hidden_layers=layers, hidden_size=WIDTH, embedding_size=16, num_attention_heads=4,
        intermediate_size=56, vocab_size=VOCAB, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return _text(AlbertModel(config), lambda o: o.last_hidden_state)


def t5_encoder(layers: int = 2, **changes: Any) -> Small:
    """Relative position bias added to unscaled logits, RMS norms, an inner width of its own."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        num_layers=layers, d_model=WIDTH, d_kv=12, d_ff=56, num_heads=4, vocab_size=VOCAB,
        use_cache=False, **changes,
    )  # fmt: skip
    return _text(T5EncoderModel(config), lambda o: o.last_hidden_state)


def _vision(layers: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": WIDTH, "num_attention_heads": 4,
        "intermediate_size": 56, "image_size": 16, "patch_size": 4,
    }  # fmt: skip


def clip_vision(layers: int = 2, **changes: Any) -> Small:
    """A convolution over patches, a class token, the quick form of gelu, a projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_vision(layers), projection_dim=24, **changes)
    return _image(CLIPVisionModelWithProjection(config), lambda o: o.image_embeds)


def vit(layers: int = 2, **changes: Any) -> Small:
    """A convolution over patches, a class token, erf gelu, a pooler."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**_vision(layers), **changes)
    return _image(
        ViTModel(config),
        lambda o: {"last_hidden_state": o.last_hidden_state, "pooled": o.pooler_output},
    )


BUILDERS: Mapping[str, Callable[..., Small]] = {
    "llama": llama, "qwen2": qwen2, "gemma2": gemma2, "gpt2": gpt2, "opt": opt, "bert": bert,
    "clip_vision": clip_vision, "vit": vit, "t5_encoder": t5_encoder,
}  # fmt: skip


NET_SOURCE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.Linear(32, 64)
        self.last = torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.last(torch.relu(self.wide(x)))
"""
