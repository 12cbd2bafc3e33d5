"""Example inputs of a model of transformers, by what its forward takes and its config says."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from ..core.errors import BadInput
from ..core.memory import refuse_beyond_memory
from ..structure.cache_slots import TOKEN_TYPES
from . import hf_florence2, hf_siglip2
from .hf_model import longest_text
from .hf_pictures import crop_count, tokens_of
from .hf_places import PREFIXED
from .hf_qwen_vl import image_sides

Example = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Inputs by name, and the dimensions of each that vary."""
_TEXT, _SEQ = "input_ids", 8
_SIDE = 224
"""Rows and columns of an image where neither config nor preprocessor says how many it has."""
ONE_IMAGE = ("owlvit", "owlv2")
"""Model types that look for all texts of a batch in each image: a graph is for one image."""
SOUND, SAMPLES = "input_values", "samples"
"""The input that holds sounds, and the name of how many samples each has."""


def example_inputs(model: Any, folder: Path) -> Example:
    """Inputs by which a model is traced.

    Text is ``input_ids``, ``attention_mask`` and, where tokens are of several kinds,
    ``token_type_ids`` (``[batch, seq]`` i64); an image ``pixel_values``; sound ``input_values``
    (samples) or ``input_features`` (a spectrogram); what a decoder is given beside its encoder
    ``decoder_input_ids`` (``[batch, decoder_seq]``).
    """
    accepted = _accepted(model)
    batch = Dim("batch")
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    main = model.main_input_name
    prompt: tuple[int, ...] = ()
    if "pixel_values" in accepted:
        prompt = image_prompt(model) if _TEXT in accepted else ()
        pixels = _image(model, folder, crops=bool(prompt))
        one = model.config.model_type in ONE_IMAGE
        inputs["pixel_values"] = pixels[:1] if one else pixels
        # Beside a text that they do not enter, there may be any number of images.
        apart = hasattr(model, "get_text_features") and not prompt
        shapes["pixel_values"] = {} if one else {0: Dim("images") if apart else batch}
    elif main in (SOUND, "input_features"):
        inputs[main], shapes[main] = _sound(model, main, batch)
    if _TEXT in accepted:
        text, shape = _text(model, accepted, prompt)
        inputs, shapes = text | inputs, dict.fromkeys(text, shape) | shapes
    if prompt and model.config.is_encoder_decoder:
        longest = longest_text(model.config.get_text_config(decoder=True))
        inputs["decoder_input_ids"], shapes["decoder_input_ids"] = hf_florence2.answer(longest)
    if "decoder_input_ids" in accepted and not prompt and model.config.is_encoder_decoder:
        longest = longest_text(model.config.get_text_config(decoder=True))
        inputs["decoder_input_ids"] = torch.ones(2, 5, dtype=torch.int64)
        shapes["decoder_input_ids"] = {0: batch, 1: Dim("decoder_seq", max=longest)}
    return inputs, shapes


def _accepted(model: Any) -> Mapping[str, Any]:
    return inspect.signature(type(model).forward).parameters


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
    return text, {0: Dim("batch"), 1: Dim("seq", max=longest)}


def _image(model: Any, folder: Path, *, crops: bool) -> torch.Tensor:
    whole = model.config
    config = getattr(whole, "vision_config", None) or getattr(whole, "encoder", whole)
    if hf_siglip2.has_patches(whole):
        height, width = hf_siglip2.image_sides(whole)
    elif whole.model_type == hf_florence2.FLORENCE2:
        height, width = hf_florence2.image_sides(whole)
    else:
        height, width = _sides(config, folder)
    frames = getattr(config, "num_frames", 1) if _TEXT not in _accepted(model) else 1
    count = crop_count(whole) if crops else frames
    shape = 2, *([count] if count > 1 else []), getattr(config, "num_channels", 3)
    refuse_beyond_memory(4 * math.prod(shape) * height * width, "an image of this size")
    return torch.zeros(*shape, height, width).to(next(model.parameters()).dtype)


def _sides(config: Any, folder: Path) -> tuple[int, int]:
    """Rows and columns: the config's, the preprocessor's, else the usual ones."""
    if hasattr(config, "spatial_merge_size"):
        return image_sides(config)
    backbone = getattr(config, "backbone_config", None)
    sizes = [getattr(c, "image_size", None) for c in (config, backbone)]
    size = next((size for size in (*sizes, _preprocessed(folder)) if size), _SIDE)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def _preprocessed(folder: Path) -> Any:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    size = settings.get("crop_size") or settings.get("size") if isinstance(settings, dict) else None
    if not isinstance(size, dict):
        return size
    return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")


def _sound(model: Any, main: str, batch: Any) -> tuple[torch.Tensor, Any]:
    """Samples of any number; of a spectrogram that many frames as the config has places for."""
    config = model.config
    dtype = next(model.parameters()).dtype
    bands = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None)
    if bands is None:
        least = least_samples(model)
        return torch.zeros(2, 3 * least, dtype=dtype), {0: batch, 1: Dim(SAMPLES, min=least)}
    frames = getattr(config, "max_length", None) if main == SOUND else None
    if frames is not None:
        return torch.zeros(2, frames, bands, dtype=dtype), {0: batch}
    places = config.max_source_positions
    if hasattr(config, "input_feat_per_channel"):
        # Frames by bands, and fewer of them where there are fewer.
        return torch.zeros(2, min(places, 64), bands, dtype=dtype), {0: batch}
    return torch.zeros(2, bands, 2 * places, dtype=dtype), {0: batch}


def least_samples(model: Any) -> int:
    """Samples that give 8 frames behind the convolutions; of fewer, positional ones see nothing."""
    frames = 8
    kernels, strides = (getattr(model.config, f"conv_{what}", ()) for what in ("kernel", "stride"))
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames
