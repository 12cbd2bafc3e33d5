"""What the models of diffusers take: example inputs and calls in tensors, under Optimum's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim

from ..core.errors import BadInput, near_misses
from .hf.pair import Part

_BATCH, _TEXT, _IMAGE = 2, 7, 12
"""Sizes of the example: no two may agree by chance."""
_SIDE = 64
"""Rows and columns of latents where the config does not say how many."""


class _Example:
    """Inputs of a call and the dimensions that vary, one by one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, Any] = {}
        self._dtype, self._batch = dtype, Dim("batch")

    def add(self, name: str, *sizes: int, varies: Mapping[int, Any] | None = None) -> None:
        """``[batch, *sizes]`` floats; ``varies`` names more dimensions."""
        self.inputs[name] = torch.zeros(_BATCH, *sizes, dtype=self._dtype)
        self.shapes[name] = {0: self._batch, **(varies or {})}

    def add_classes(self, name: str) -> None:
        self.inputs[name] = torch.zeros(_BATCH, dtype=torch.int64)
        self.shapes[name] = {0: self._batch}

    def add_places(self, name: str, count: int, dim: Any) -> None:
        """``[tokens, 3]``: where tokens stand, the same in every row of a batch."""
        self.inputs[name] = torch.zeros(count, 3, dtype=self._dtype)
        self.shapes[name] = {0: dim}

    def part(self, output: str, call: Callable[..., Any]) -> Part:
        """The call that returns one tensor, by the name of it."""
        return Part(self.inputs, self.shapes, lambda model, feeds: {output: call(model, **feeds)})


def _sides(config: Any) -> tuple[int, int]:
    size = config.sample_size
    height, width = size if isinstance(size, tuple | list) else (size or _SIDE,) * 2
    return int(height), int(width)


def _unet(model: Any, dtype: torch.dtype) -> Part:
    config, example = model.config, _Example(dtype)
    kinds = {
        name: getattr(config, name)
        for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
    }
    strange = [f"{n}={k!r}" for n, k in kinds.items() if k not in (None, "text_time", "text_proj")]
    if strange:
        raise BadInput(f"config.json: a UNet with {strange[0]} takes inputs that are not known")
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    example.add("sample", config.in_channels, *_sides(config))
    example.add("timestep")
    example.add("encoder_hidden_states", _TEXT, width, varies={1: Dim("text")})
    if config.num_class_embeds:
        example.add_classes("class_labels")
    if config.time_cond_proj_dim:
        example.add("timestep_cond", config.time_cond_proj_dim)
    sized = config.addition_embed_type == "text_time"
    if sized:
        numbers = 6 * config.addition_time_embed_dim
        example.add("text_embeds", config.projection_class_embeddings_input_dim - numbers)
        example.add("time_ids", 6)

    def call(model: Any, **feeds: torch.Tensor) -> torch.Tensor:
        added = {n: feeds.pop(n) for n in ("text_embeds", "time_ids") if sized}
        more = {"added_cond_kwargs": added} if sized else {}
        return _forward(model, **feeds, **more)

    return example.part("out_sample", call)


def _dit(model: Any, dtype: torch.dtype) -> Part:
    example = _Example(dtype)
    example.add("hidden_states", model.config.in_channels, *_sides(model.config))
    example.add("timestep")
    example.add_classes("class_labels")
    return example.part("out_hidden_states", _forward)


def _sd3(model: Any, dtype: torch.dtype) -> Part:
    config, example = model.config, _Example(dtype)
    example.add("hidden_states", config.in_channels, *_sides(config))
    example.add("encoder_hidden_states", _TEXT, config.joint_attention_dim, varies={1: Dim("text")})
    example.add("pooled_projections", config.pooled_projection_dim)
    example.add("timestep")
    return example.part("out_hidden_states", _forward)


def _flux(model: Any, dtype: torch.dtype) -> Part:
    config, example = model.config, _Example(dtype)
    image, text = Dim("image"), Dim("text")
    example.add("hidden_states", _IMAGE, config.in_channels, varies={1: image})
    example.add("encoder_hidden_states", _TEXT, config.joint_attention_dim, varies={1: text})
    example.add("pooled_projections", config.pooled_projection_dim)
    example.add("timestep")
    example.add_places("img_ids", _IMAGE, image)
    example.add_places("txt_ids", _TEXT, text)
    if config.guidance_embeds:
        example.add("guidance")
    return example.part("out_hidden_states", _forward)


def _autoencoder(model: Any, dtype: torch.dtype) -> Part:
    example = _Example(dtype)
    example.add("sample", model.config.in_channels, *_sides(model.config))
    return example.part("out_sample", _forward)


def _encoder(model: Any, dtype: torch.dtype) -> Part:
    def call(model: Any, sample: torch.Tensor) -> Any:
        return model.encode(sample).latent_dist.parameters

    example = _Example(dtype)
    example.add("sample", model.config.in_channels, *_sides(model.config))
    return example.part("latent_parameters", call)


def _decoder(model: Any, dtype: torch.dtype) -> Part:
    def call(model: Any, latent_sample: torch.Tensor) -> Any:
        return model.decode(latent_sample).sample

    shrunk = 2 ** (len(model.config.block_out_channels) - 1)
    height, width = (max(2, side // shrunk) for side in _sides(model.config))
    example = _Example(dtype)
    example.add("latent_sample", model.config.latent_channels, height, width)
    return example.part("sample", call)


def _forward(model: Any, **feeds: Any) -> torch.Tensor:
    sample: torch.Tensor = type(model).forward(model, **feeds, return_dict=True).sample
    return sample


_PARTS: Mapping[str, Callable[[Any, torch.dtype], Part]] = {
    "encoder": _encoder, "decoder": _decoder,
}  # fmt: skip
KNOWN: Mapping[str, Callable[[Any, torch.dtype], Part]] = {
    "UNet2DConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "AutoencoderKL": _autoencoder,
}
"""By class, what one run of it takes."""


def denoising(model: Any, part: str | None, dtype: torch.dtype) -> Part:
    """One step of a denoiser, or what an autoencoder does as a whole or in one of its parts.

    Raises ``BadInput`` for a part that the model has not, and for a config that asks for inputs
    that are not known.
    """
    name = type(model).__name__
    if part is None:
        return KNOWN[name](model, dtype)
    if name != "AutoencoderKL":
        raise BadInput(f"{name} is one graph: it has no part {part!r}")
    if part not in _PARTS:
        raise BadInput(f"there is no part {part!r}; {near_misses(part, _PARTS)}")
    return _PARTS[part](model, dtype)
