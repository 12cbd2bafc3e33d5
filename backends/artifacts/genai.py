"""``genai_config.json``: what onnxruntime-genai needs to write text with an artifact as it is.

Its parser refuses keys that it does not know, at any level, so the file holds the fewest that every
release since 0.8 takes: sizes, special tokens and the graph's file. Names of inputs and outputs are
the runtime's own defaults, which our graphs have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ir.core.view import View
from ...ir.load.side_files import longest_text, read_json, text_settings
from ...ir.structure.cache_slots import POSITIONS, ROWS_KEY, is_recurrent, past_slot
from ...ir.vocab.targets import CPU, Target
from ..onnx.model_files import MODEL_FILE
from .artifact import GENAI_FILE

TYPES = frozenset({
    "chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama",
    "mistral", "nemotron", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3",
})  # fmt: skip
"""Types of decoders that the runtime knows by name and treats alike. ``decoder`` is its neutral
word; ``gpt2`` is a type with a cache of another form, which our graphs have not."""
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_INPUTS = {"input_ids", "attention_mask", POSITIONS}


def write_genai_config(graph: View, folder: Path, target: Target = CPU) -> bool:
    """Write the file where ``graph`` is a decoder that the runtime can drive; whether it was.

    Its sizes are the graph's, its special tokens and longest text those of the source's folder.
    ``graph`` is the one that was written for ``target``: attention that keeps its own cache
    gets one buffer a layer, of the longest text, in which it writes, where ``ROWS_KEY`` allows it.
    """
    config = genai_config(graph, graph.source.folder, target)
    if config is not None:
        (folder / GENAI_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return config is not None


def genai_config(
    graph: View, source: str | None, target: Target = CPU
) -> dict[str, Any] | None:
    """The content of the file; ``None`` for a graph that is not a decoder of text with a cache, or
    whose longest text nobody says, or with a cache as in ``strange_cache``."""
    inputs = graph.input_types()
    outputs = dict(zip(graph.output_names(), map(graph.type, graph.outputs()), strict=True))
    caches = [name for name in inputs if past_slot(name) is not None]
    longest = longest_text(source)
    if not caches or set(inputs) - set(caches) - _INPUTS or "logits" not in outputs:
        return None
    if strange_cache(graph):
        return None
    shape, logits = inputs[caches[0]].shape or (), outputs["logits"].shape or ()
    if longest is None or len(shape) != 4 or len(logits) != 3 or not isinstance(logits[-1], int):
        return None
    settings = settings_of(source)
    kind = settings.get("model_type")
    return {
        "model": {
            "type": kind if kind in TYPES else "decoder",
            "context_length": longest,
            "vocab_size": logits[-1],
            **special_tokens(settings),
            "decoder": {
                "filename": MODEL_FILE,
                **session(target),
                "head_size": shape[3],
                "num_key_value_heads": shape[1],
                "num_hidden_layers": len(caches) // 2,
            },
        },
        "search": {
            "max_length": longest,
            "past_present_share_buffer": graph.metadata().get(ROWS_KEY) == "shared",
        },
    }  # fmt: skip


def strange_cache(graph: View) -> str:
    """Why the runtime does not drive a decoder of text, where it is for what it keeps: a state
    beside keys and values, or latents (DeepSeek-V2, arXiv 2405.04434), since it makes the values of
    a layer as wide as its keys. Empty where it does, and for other graphs."""
    inputs = graph.input_types()
    states = [name for name in inputs if is_recurrent(name)]
    caches = {name: type_ for name, type_ in inputs.items() if past_slot(name) is not None}
    if set(inputs) - {*states, *caches} - _INPUTS:
        return ""
    if states:
        return f"{states[0]} is a state, and the file is written for keys and values alone"
    keys = {name: type_ for name, type_ in caches.items() if name.endswith(".key")}
    for name, key in keys.items():
        value = caches.get(f"{name.removesuffix('key')}value", key)
        if (key.shape or ())[1:4:2] != (value.shape or ())[1:4:2]:
            return f"{name} is {key} and its values are {value}, which it makes alike"
    return ""


def session(target: Target) -> dict[str, Any]:
    """What the runtime starts instead of the CPU's provider, if anything."""
    providers: list[dict[str, Any]] = [{name: {}} for name in target.providers]
    return {"session_options": {"provider_options": providers}} if providers else {}


def settings_of(source: str | Path | None) -> dict[str, Any]:
    """Special tokens and type of a text: of ``generation_config.json`` before those of the config,
    whose own go before those of its text."""
    config = read_json(source, "config.json")
    ends = {name: config[name] for name in _ENDS if config.get(name) is not None}
    generation = _known(read_json(source, "generation_config.json"))
    return {**text_settings(config), **ends, **generation}


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text, where the model has them. The runtime takes
    0 for a padding token that is not given, and ends texts with it: the end token is safer."""
    end = settings.get("eos_token_id")
    first = end[0] if isinstance(end, list) and end else end
    pad = settings.get("pad_token_id")
    ids = {
        "bos_token_id": settings.get("bos_token_id"), "eos_token_id": end,
        "pad_token_id": first if pad is None else pad,
    }  # fmt: skip
    return {name: value for name, value in ids.items() if isinstance(value, int | list)}
