"""Example sounds of a model of transformers, samples or the frames of a spectrogram, and series.

Which of them, and how many there may be, is what the config of the part that hears says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from torch.nn.functional import pad

from ..side_files import read_json

SOUND, SPECTRUM, SAMPLES, FRAMES = "input_values", "input_features", "samples", "frames"
"""The inputs that hold sounds, and the names of how many samples or frames each has."""
SERIES = "past_values"
"""The input that holds measurements over time, of several channels."""
_HEARD = 8
"""Steps that an example has behind its convolutions; of fewer, positional ones see nothing."""
_MOONSHINE = ((127, 7, 3), (64, 3, 2))
"""Kernels and strides that Moonshine's library writes as numbers."""
_FRAMES = 64
Sound = tuple[torch.Tensor, dict[int, Any]]


def example_sound(model: Any, main: str, batch: Any, folder: Path) -> dict[str, Sound]:
    """Inputs by name with the dimensions that vary.

    ``input_values`` ``[batch, samples]``; ``input_features`` ``[batch, bands, frames]`` of as many
    frames as Whisper has places for, ``[batch, 1, frames, bands]`` of as many as CLAP's image of
    them has rows, else ``[batch, frames, bands]`` of any number, with the ``attention_mask``
    ``[batch, frames]`` of those that count where the forward takes it.
    """
    config, dtype = model.config, next(model.parameters()).dtype
    if main == SOUND and next(_convolutions(model), None) is not None:
        least, most = least_samples(model), _most_samples(model)
        sides = {0: batch, 1: Dim(SAMPLES, min=least, max=most)}
        # Enough that no two dimensions behind the convolutions agree by chance.
        return {main: (torch.zeros(2, min(3 * least, most or 3 * least), dtype=dtype), sides)}
    bands = _bands(config)
    if main == SOUND and getattr(config, "max_length", None):
        return {main: (torch.zeros(2, config.max_length, bands, dtype=dtype), {0: batch})}
    spectrum = getattr(config, "audio_config", config)
    if hasattr(spectrum, "spec_size"):
        rows = _clap_frames(spectrum, folder)
        return {main: (torch.zeros(2, 1, rows, bands, dtype=dtype), {0: batch})}
    places: Any = getattr(config, "max_source_positions", None)
    if hasattr(config, "input_feat_per_channel"):
        # Frames by bands, and fewer of them where there are fewer.
        return {main: (torch.zeros(2, min(places, _FRAMES), bands, dtype=dtype), {0: batch})}
    if places is not None and not hasattr(config, "feature_projection_input_dim"):
        return {main: (torch.zeros(2, bands, 2 * places, dtype=dtype), {0: batch})}
    return _frames(model, main, batch, bands, dtype)


def example_series(model: Any, batch: Any) -> Sound:
    """Series ``[batch, context_length, num_input_channels]``: PatchTST's and PatchTSMixer's."""
    config, dtype = model.config, next(model.parameters()).dtype
    values = torch.zeros(2, config.context_length, config.num_input_channels, dtype=dtype)
    return values, {0: batch}


def heard_by(model: Any, accepted: Mapping[str, Any]) -> str:
    """Which input holds what a model hears; empty of one that reads texts first. A pair of an
    encoder and a decoder of other families takes what its encoder does."""
    if model.main_input_name in (SOUND, SPECTRUM):
        return str(model.main_input_name)
    if "input_ids" in accepted or not {SOUND, SPECTRUM} & accepted.keys():
        return ""
    return SOUND if next(_convolutions(model), None) else SPECTRUM


def _frames(
    model: Any, main: str, batch: Any, bands: int, dtype: torch.dtype
) -> dict[str, Sound]:  # fmt: skip
    sides = {0: batch, 1: Dim(FRAMES, min=_FRAMES)}
    sound = {main: (torch.zeros(2, 2 * _FRAMES, bands, dtype=dtype), sides)}
    if "attention_mask" in inspect.signature(type(model).forward).parameters:
        sound["attention_mask"] = (torch.ones(2, 2 * _FRAMES, dtype=torch.int64), sides)
    return sound


def _parts(config: Any) -> Iterator[Any]:
    """A config, and those of the parts that hear."""
    yield config
    names = ("encoder_config", "audio_config", "encoder")
    yield from (part for name in names if (part := getattr(config, name, None)) is not None)


def _bands(config: Any) -> int:
    names = ("feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel")
    found = (getattr(part, name, None) for part in _parts(config) for name in names)
    return int(next(size for size in found if size))


def _clap_frames(config: Any, folder: Path) -> int:
    """Frames of a clip: what the preprocessor cuts, else the rows that they are spread over."""
    said = read_json(folder, "preprocessor_config.json")
    if {"nb_max_samples", "hop_length"} <= said.keys():
        return int(said["nb_max_samples"]) // int(said["hop_length"]) + 1
    return int(config.spec_size) * (int(config.spec_size) // int(config.num_mel_bins))


def _convolutions(model: Any) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    if model.config.model_type == "moonshine":
        yield _MOONSHINE
    for part in _parts(model.config):
        if getattr(part, "conv_kernel", None) and getattr(part, "conv_stride", None):
            yield part.conv_kernel, part.conv_stride


def least_samples(model: Any) -> int:
    """Samples that give ``_HEARD`` steps."""
    return _samples(model, _HEARD)


def least_sizes(model: Any, inputs: Sequence[str]) -> dict[str, int]:
    """Of a graph with inputs of these names, by the names of its dimensions."""
    if SOUND in inputs:
        return {SAMPLES: least_samples(model)}
    long = SPECTRUM in inputs and "attention_mask" in inputs and "input_ids" not in inputs
    return {FRAMES: _FRAMES} if long else {}


def _most_samples(model: Any) -> int | None:
    """Samples whose steps have places, where a config says how many there are."""
    config = model.config
    places = getattr(config, "max_speech_positions", None)
    if getattr(config, "position_embeddings_type", None):
        places = config.max_source_positions
    return None if places is None else _samples(model, places)


def length_notes(model: Any, inputs: Sequence[str]) -> tuple[str, ...]:
    """What a person should know of how long sounds may be."""
    most = _most_samples(model) if SOUND in inputs and next(_convolutions(model), None) else None
    return () if most is None else (f"sounds are of {most} samples at most, as far as places go",)


def settle_squeeze(model: torch.nn.Module) -> None:
    """Let SEW's stacks (arXiv 2109.06870), which look at every second step, cut what they give to
    as many steps as they took. The library fills it up where it is too short, and a graph would
    for ever do what it did for the example: it gave a step less of sounds of an odd number."""
    part: Any
    for part in model.modules():
        after: Any = getattr(part, "upsample", None)
        if hasattr(after, "squeeze_factor"):
            after.forward = partial(_beyond, after)
            part.forward = partial(_cut, part)


def _beyond(upsample: Any, states: torch.Tensor) -> torch.Tensor:
    """``[batch, steps, width]`` with so many zeros behind it that it is never too short."""
    return pad(type(upsample).forward(upsample, states), (0, 0, 0, upsample.squeeze_factor))


def _cut(stack: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
    output = type(stack).forward(stack, hidden_states, **options)
    output.last_hidden_state = output.last_hidden_state[:, : hidden_states.shape[1]]
    return output


def _samples(model: Any, steps: int) -> int:
    kernels, strides = next(_convolutions(model), ((), ()))
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        steps = (steps - 1) * stride + kernel
    return steps
