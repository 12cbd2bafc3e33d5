"""Hugging Face folders as originals: transformers loads the weights and runs its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.mapped_pages import release_in_turn
from ...core.memory import available_bytes
from ...core.weights import Weight
from ...structure.cache_slots import SHIFT, is_state, present_of
from ..tracing.original import Call, ModuleOriginal
from ..tracing.plain_call import cache_argument, cache_name, named_tensors
from .experts import fill
from .inputs import call_options, image_prompt
from .pictures import as_the_library_takes
from .places import PREFIXED, TURNED, token_places
from .slots import Held, cache_holding, presents_in


def hf_original(
    folder: Path, model: Any, stored: torch.dtype, *, trust_remote_code: bool,
    call: Call | None = None, weights: Mapping[str, Weight] | None = None,
    held: Sequence[Held] = (),
) -> ModuleOriginal:  # fmt: skip
    """``from_pretrained`` of the class, config, dtype and attention that ``model`` was built with.

    ``weights`` are given where the library cannot read the checkpoint, as a quantized one without a
    package of its own: its forward then runs with what was read here.

    In the dtype that the file stores the library maps the weights: they take no memory of their
    own. In another one, where a copy of them all would take more than half of what the machine has
    to give, they are mapped too, and each module's are cast while it runs.
    """
    from transformers import __version__

    cls, config = type(model), model.config
    dtype, attention = next(model.parameters()).dtype, config._attn_implementation
    options: dict[str, Any] = {}
    if getattr(model, "pooler", model) is None and _takes(cls.__init__, "add_pooling_layer"):
        options["add_pooling_layer"] = False
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    whole = stored == dtype or size <= available_bytes() // 2
    cached = call is None and bool(cache_name(model.forward))

    def filled() -> torch.nn.Module:
        assert weights is not None
        module: torch.nn.Module = cls._from_config(
            config, dtype=dtype, attn_implementation=attention, **options
        )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                fill(parameter, name, weights)
        return module.eval()

    def make() -> torch.nn.Module:
        loaded: torch.nn.Module = cls.from_pretrained(
            folder, config=config, dtype=dtype if whole else stored,
            attn_implementation=attention, trust_remote_code=trust_remote_code,
            local_files_only=True, use_safetensors=True, **options,
        )  # fmt: skip
        release_in_turn(loaded)
        _complete(loaded)
        if not whole:
            cast_in_turn(loaded, dtype)
        return loaded

    usual = partial(_cached_call, held) if cached else _call
    by = f"{cls.__name__} in transformers {__version__}"
    if weights is not None:
        return ModuleOriginal(f"{by} with the weights as they were read", filled, call or usual)
    how = "" if whole else ", the weights of one module at a time"
    return ModuleOriginal(by + how, make, call or usual)


def _complete(model: Any) -> None:
    """Let Llama 4's text say that it has no images: since 5.24 the forward of the whole asks its
    output for them, which has no such field."""
    if model.config.model_type == "llama4":
        model.language_model.register_forward_hook(
            lambda _, __, output: setattr(output, "image_outputs", None)
        )


def cast_in_turn(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let each module have its own parameters in another dtype while it runs."""

    def cast(part: torch.nn.Module, own: Mapping[str, torch.nn.Parameter]) -> None:
        for name, parameter in own.items():
            part._parameters[name] = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)

    for part in model.modules():
        own = {n: p for n, p in part._parameters.items() if p is not None and p.dtype != dtype}
        if own:
            part.register_forward_pre_hook(lambda part, _, own=own: cast(part, own))
            part.register_forward_hook(lambda part, _, __, own=own: part._parameters.update(own))


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _call(model: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The library's forward; of its outputs those that are tensors, for a model of images and text
    the logits alone, as its graph has them."""
    inputs = as_the_library_takes(model, feeds)
    output = model(**inputs, **call_options(model))
    if image_prompt(model) and "pixel_values" in feeds:
        return {"logits": output.logits}
    return named_tensors(output, inputs)


def _cached_call(
    held: Sequence[Held], model: Any, feeds: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The library's forward with a cache that keeps all tokens, as the graph's does: of layers that
    look at the last ones alone the library's own would drop the others, which their masks hide.

    Positions are as its ``generate`` has them. A prompt starts without a cache; a step without an
    image leaves the pixels away.
    """
    plain = {n: t for n, t in feeds.items() if n == SHIFT or not is_state(n)}
    inputs = as_the_library_takes(model, plain)
    cache = cache_holding(model.config, held, feeds, own=True)
    if "pixel_values" in inputs and not len(inputs["pixel_values"]):
        del inputs["pixel_values"]
        if model.config.model_type == "blip-2":  # whose forward is for texts with an image alone
            model = model.language_model
    shift, kind = inputs.pop(SHIFT, None), model.config.model_type
    mask = inputs["attention_mask"]
    past = mask.shape[1] - inputs["input_ids"].shape[1]
    places = token_places(mask, past)
    if not past:  # a prompt, to which an empty cache was given
        shift = None
    if kind in TURNED and shift is not None:
        inputs["position_ids"] = (places + shift).expand(3, -1, -1)
    elif kind not in TURNED and _takes(model.forward, "position_ids"):
        inputs["position_ids"] = places + (kind in PREFIXED)
    options = {cache_argument(model): cache, "use_cache": True, "return_dict": True}
    output = model(**inputs, **options)
    presents = presents_in(cache, held)
    if kind in TURNED:
        presents[present_of(SHIFT)] = model.model.rope_deltas if shift is None else shift
    return {"logits": output.logits} | presents
