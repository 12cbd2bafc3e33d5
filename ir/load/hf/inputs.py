"""Example inputs of a model of transformers, by what its forward takes and its config says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from ...core.errors import BadInput
from ...core.memory import refuse_beyond_memory
from ...structure.cache_slots import GLOBAL_MASK, TOKEN_TYPES
from ..side_files import read_json
from . import florence2, gemma4, phi4, siglip2
from .layout import beside_tokens
from .model import longest_text
from .model_class import VIDEO
from .pictures import crop_count, tokens_of
from .places import PREFIXED
from .qwen_vl import image_sides
from .sound import SERIES, SOUND, SPECTRUM, example_series, example_sound, heard_by

Example = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Inputs by name, and the dimensions of each that vary."""
_TEXT, _SEQ = "input_ids", 8
_SIDE = 224
"""Rows and columns of an image where neither config nor preprocessor says how many it has."""
_OWN_SIDES = {
    florence2.FLORENCE2: florence2.image_sides, gemma4.GEMMA4: gemma4.image_sides,
    phi4.PHI4: phi4.image_sides,
}  # fmt: skip
"""How high and wide an image is, by whole configs of model types that say it in their own way."""
ONE_IMAGE = ("owlvit", "owlv2")
"""Model types that look for all texts of a batch in each image: a graph is for one image."""


def example_inputs(model: Any, folder: Path) -> Example:
    """Inputs by which a model is traced.

    Text is ``input_ids``, ``attention_mask`` and, where tokens are of several kinds,
    ``token_type_ids`` (``[batch, seq]`` i64), with what stands beside them on a page or in a table
    (``layout``); an image ``pixel_values``; sound ``input_values``
    (samples) or ``input_features`` (a spectrogram); what a decoder is given beside its encoder
    ``decoder_input_ids`` (``[batch, decoder_seq]``).
    """
    accepted = _accepted(model)
    batch = Dim("batch")
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    prompt: tuple[int, ...] = ()
    if shown(model):
        prompt = image_prompt(model) if _TEXT in accepted else ()
        pixels = _image(model, folder, crops=bool(prompt))
        one = model.config.model_type in ONE_IMAGE
        inputs["pixel_values"] = pixels[:1] if one else pixels
        # Beside a text that they do not enter, there may be any number of images.
        together = prompt or hasattr(model.config, "multimodal_config")
        apart = hasattr(model, "get_text_features") and not together
        shapes["pixel_values"] = {} if one else {0: Dim("images") if apart else batch}
    elif model.main_input_name == VIDEO:
        inputs[VIDEO], shapes[VIDEO] = _video(model), {0: batch}
    elif heard := heard_by(model, accepted):
        for name, (sound, sides) in example_sound(model, heard, batch, folder).items():
            inputs[name], shapes[name] = sound, sides
    elif SPECTRUM in accepted and hasattr(model, "get_audio_features"):
        # Beside a text that they do not enter, there may be any number of sounds, too.
        ((sound, sides),) = example_sound(model, SPECTRUM, Dim("sounds"), folder).values()
        inputs[SPECTRUM], shapes[SPECTRUM] = sound, sides
    if SERIES in accepted:
        inputs[SERIES], shapes[SERIES] = example_series(model, batch)
    if _TEXT in accepted:
        text, shape = _text(model, accepted, prompt)
        inputs, shapes = text | inputs, dict.fromkeys(text, shape) | shapes
    if prompt and model.config.is_encoder_decoder:
        longest = longest_text(model.config.get_text_config(decoder=True))
        inputs["decoder_input_ids"], shapes["decoder_input_ids"] = florence2.answer(longest)
    if "decoder_input_ids" in accepted and not prompt and model.config.is_encoder_decoder:
        longest = longest_text(model.config.get_text_config(decoder=True))
        inputs["decoder_input_ids"] = torch.ones(2, 5, dtype=torch.int64)
        shapes["decoder_input_ids"] = {0: batch, 1: Dim("decoder_seq", max=longest)}
    return inputs, shapes


def shown(model: Any) -> bool:
    """Whether a forward takes images that a graph has."""
    return "pixel_values" in _accepted(model) or model.config.model_type == phi4.PHI4


def _accepted(model: Any) -> Mapping[str, Any]:
    return inspect.signature(type(model).forward).parameters


def call_options(model: Any) -> dict[str, Any]:
    """What a forward is told beside tensors: its outputs by name, and no cache where it may have
    one. CLAP hands what it does not know on to a tower that knows no cache."""
    accepted = _accepted(model)
    options: dict[str, Any] = {"return_dict": True, "use_cache": False}
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return {name: value for name, value in options.items() if name in accepted}
    heard = model.main_input_name in (SOUND, SPECTRUM) or hasattr(model, "get_audio_features")
    if heard and "use_cache" not in accepted:
        del options["use_cache"]
    return options


def unmeasured(model: Any, feeds: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A graph's inputs as the forward takes them without a look at their number: CLIPSeg counts
    its texts, which would bind a graph to as many as the example has."""
    if model.config.model_type != "clipseg" or not hasattr(model, "clip"):
        return feeds
    texts = {name: tensor for name, tensor in feeds.items() if name != "pixel_values"}
    embeddings = model.clip.get_text_features(**texts, return_dict=True).pooler_output
    return {"pixel_values": feeds["pixel_values"], "conditional_embeddings": embeddings}


def image_prompt(model: Any) -> tuple[int, ...]:
    """The placeholders of one image, one for each of the features that the model makes of it."""
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        return ()
    length = tokens_of(model.config)
    longest = longest_text(model.config.get_text_config())
    if longest is not None and length > longest:
        raise BadInput(f"an image takes {length} tokens, and a text has {longest} tokens at most")
    return (token,) * length


def _text(model: Any, accepted: Mapping[str, Any], prompt: tuple[int, ...]) -> tuple[Any, Any]:
    config = model.config.get_text_config()
    longest = longest_text(config)
    ids = torch.tensor([list(prompt) + [1] * min(_SEQ, longest or _SEQ)] * 2)
    text = {_TEXT: ids}
    if "attention_mask" in accepted:
        text["attention_mask"] = torch.ones_like(ids)
    typed = (getattr(config, "type_vocab_size", None) or 0) > 1
    if TOKEN_TYPES in accepted and (typed or model.config.model_type in PREFIXED):
        text[TOKEN_TYPES] = torch.zeros_like(ids)
    # Longformer's classifier marks the first token by itself.
    if GLOBAL_MASK in accepted and "SequenceClassification" not in type(model).__name__:
        text[GLOBAL_MASK] = torch.zeros_like(ids)
    text |= beside_tokens(model, accepted, ids)
    return text, {0: Dim("batch"), 1: Dim("seq", max=longest)}


def _image(model: Any, folder: Path, *, crops: bool) -> torch.Tensor:
    whole = model.config
    parts = (getattr(whole, f"{name}_config", None) for name in ("vision", "image"))
    config = next((part for part in parts if part is not None), getattr(whole, "encoder", whole))
    own = siglip2.image_sides if siglip2.has_patches(whole) else _OWN_SIDES.get(whole.model_type)
    height, width = _sides(config, folder) if own is None else own(whole)
    frames = getattr(config, "num_frames", 1)
    count = crop_count(whole) if crops else frames
    shape = 2, *([count] if count > 1 else []), getattr(config, "num_channels", 3)
    refuse_beyond_memory(4 * math.prod(shape) * height * width, "an image of this size")
    return torch.zeros(*shape, height, width).to(next(model.parameters()).dtype)


def _video(model: Any) -> torch.Tensor:
    """Two videos of as many frames as the config says, ``[2, frames, channels, side, side]``."""
    config = model.config
    shape = 2, config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size
    refuse_beyond_memory(4 * math.prod(shape), "a video of this size")
    return torch.zeros(shape).to(next(model.parameters()).dtype)


def left_out_notes(model: Any, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """What a person should know of inputs of the forward that a graph has not."""
    hears = getattr(model.config, "audio_config", None) is not None
    taken = {*inputs, *([phi4.PIXELS] if "pixel_values" in inputs else [])}
    lost = [f"{what} ({name})" for name, what in _LEFT_OUT.items()
            if name in _accepted(model) and name not in taken
            and (name != SPECTRUM or hears)]  # fmt: skip
    if not lost:
        return ()
    advice = "gw.trace(model, kwargs=processor(...)) traces it with them"
    if model.config.model_type == phi4.PHI4:
        advice = 'gw.load(FOLDER, part="sounds") is the tower of these'
    note = f"the forward takes {' and '.join(lost)} too, and the graph is as if none were given"
    return (f"{note}: {advice}",)


_LEFT_OUT = {
    "image_pixel_values": "pictures",
    "audio_input_features": "sounds", SPECTRUM: "sounds",
}  # fmt: skip


def _sides(config: Any, folder: Path) -> tuple[int, int]:
    """Rows and columns: the config's, the preprocessor's, else the usual ones."""
    if hasattr(config, "spatial_merge_size"):
        return image_sides(config)
    backbone = getattr(config, "backbone_config", None)
    sizes = [getattr(c, "image_size", None) for c in (config, backbone)]
    sizes.append(getattr(config, "input_size", None))  # LayoutLMv3's name of it
    size = next((size for size in (*sizes, _preprocessed(folder)) if size), _SIDE)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def _preprocessed(folder: Path) -> Any:
    settings = read_json(folder, "preprocessor_config.json")
    size = settings.get("crop_size") or settings.get("size")
    if not isinstance(size, dict):
        return size
    return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
