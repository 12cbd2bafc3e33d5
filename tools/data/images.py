"""Image files and prompts as inputs of a vision or vision-language model.

How pixels become numbers is read from the model's ``preprocessor_config.json``, how many
placeholders an image takes from its ``config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.core.files import open_regular
from ...ir.core.types import Dim
from ...ir.core.view import View
from ...ir.load.hf.phi4 import PHI4
from ...ir.load.side_files import read_json
from ...ir.structure.pictured import read_grid, read_prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
"""Pillow's names of them. It goes by what a file holds, not by its name: for PostScript it would
start another program."""
SETTINGS = "preprocessor_config.json"
MOST_FEATURES = 1 << 16
"""Of an image: no model's context holds more."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)
"""Of CLIP's training images (Radford et al. 2021, arXiv 2103.00020): where a config says none."""
RESAMPLES = range(6)
BICUBIC = 3
"""``PIL.Image.Resampling.BICUBIC``, which CLIP resizes by."""


@dataclass(frozen=True)
class Preprocessing:
    """``pixel = (resized image / 255 - mean) / std``, ``[3, height, width]`` f32, cut into crops
    ``[1 + rows * columns, 3, height, width]`` where the model takes them: a thumbnail, then the
    image's tiles, row by row."""

    height: int
    width: int
    tiles: tuple[int, int]
    """Rows and columns of tiles; none of both for a model that takes no crops."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool
    """Resize the shorter edge and cut the middle out, as CLIP does; else resize both edges."""
    resample: int
    """How to interpolate, in Pillow's numbers."""

    @classmethod
    def of(cls, view: View) -> Preprocessing:
        """Of the model's folder. Raises ``BadInput`` for a graph that takes no fixed image size."""
        height, width, tiles = _image_size(view)
        settings = read_json(view.source.folder, SETTINGS)
        size = settings.get("size")
        shortest = size.get("shortest_edge") if isinstance(size, dict) else size
        if isinstance(size, dict) and "longest_edge" in size:
            shortest = None  # bounds of what is resized as it is, Qwen2-VL's in pixels
        # Its file says neither, and its processor's own are no others' (Phi-4-multimodal).
        halves = read_json(view.source.folder, "config.json").get("model_type") == PHI4
        resample = settings.get("resample", BICUBIC)
        if resample not in RESAMPLES:
            raise BadInput(f"{view.source.folder}/{SETTINGS}: resample is {resample!r}, not 0 to 5")
        return cls(
            height, width, tiles,
            _channels(view, settings, "image_mean", HALVES if halves else CLIP_MEAN),
            _channels(view, settings, "image_std", HALVES if halves else CLIP_STD),
            crop=shortest is not None and bool(settings.get("do_center_crop", True)),
            resample=resample,
        )  # fmt: skip

    def read(self, path: Path) -> torch.Tensor:
        """The pixels of an image file. ``Missing`` where it or Pillow is not there, ``BadInput``
        where it is not an image of ``FORMATS``, or one of more pixels than Pillow takes."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise Missing("reading images needs Pillow: pip install pillow") from None
        if not path.exists():
            raise Missing(f"{path}: no such image")
        with open_regular(path) as raw:
            try:
                image = Image.open(raw, formats=FORMATS).convert("RGB")
            except UnidentifiedImageError:
                known = ", ".join(FORMATS)
                raise BadInput(f"{path}: not an image that can be read ({known})") from None
            except Exception as error:
                # Each of Pillow's decoders raises errors of its own.
                raise BadInput(f"{path}: not an image that can be read ({error})") from None
        pixels = np.asarray(self._resized(image), dtype=np.float32) / 255
        mean, std = (np.asarray(numbers, dtype=np.float32) for numbers in (self.mean, self.std))
        scaled = (pixels - mean) / std
        whole = torch.from_numpy(scaled).permute(2, 0, 1).contiguous()
        return self._crops(whole) if any(self.tiles) else whole

    def _resized(self, image: Any) -> Any:
        wide, high = image.size
        rows, columns = (max(1, count) for count in self.tiles)
        width, height = columns * self.width, rows * self.height
        if not self.crop:
            return image.resize((width, height), self.resample)
        scale = max(width / wide, height / high)
        wide, high = max(width, round(wide * scale)), max(height, round(high * scale))
        left, top = (wide - width) // 2, (high - height) // 2
        whole = image.resize((wide, high), self.resample)
        return whole.crop((left, top, left + width, top + height))

    def _crops(self, whole: torch.Tensor) -> torch.Tensor:
        rows, columns = self.tiles
        grid = whole.reshape(-1, rows, self.height, columns, self.width)
        thumbnail = torch.nn.functional.avg_pool2d(whole, self.tiles)
        return torch.cat([thumbnail[None], grid.permute(1, 3, 0, 2, 4).flatten(0, 1)])


@dataclass(frozen=True)
class Placeholders:
    """The token that stands for one feature of an image, and how many stand for an image."""

    token: int
    count: int

    @classmethod
    def of(cls, view: View) -> Placeholders:
        """By what the graph says of its images, else the model's ``config.json``. Raises
        ``BadInput`` where neither says."""
        prompt = read_prompt(view.metadata())
        if prompt:
            return cls(prompt[0], len(prompt))
        config = read_json(view.source.folder, "config.json")
        token = config.get("image_token_id", config.get("image_token_index"))
        count = config.get("image_seq_length") or _features(config)
        if not isinstance(token, int) or not isinstance(count, int) or count > MOST_FEATURES:
            raise BadInput(
                f"{view.source.name}: no config.json beside the model says which token stands for "
                "an image (image_token_id) and how often (image_seq_length); give the inputs as "
                ".npz or .safetensors"
            )
        return cls(token, count)

    def expand(self, ids: list[int]) -> list[int]:
        """The prompt's ids with the placeholders in place of its one image token, or behind the
        first token where it has none. Raises ``BadInput`` where it has several."""
        places = [i for i, token in enumerate(ids) if token == self.token]
        if len(places) > 1:
            raise BadInput(f"{len(places)} image tokens in one prompt: one image is taken")
        start = places[0] if places else 1
        return [*ids[:start], *[self.token] * self.count, *ids[start + len(places) :]]


def _channels(
    view: View, settings: dict[str, Any], key: str, usual: tuple[float, ...]
) -> tuple[float, ...]:
    """A number for each channel. Raises ``BadInput`` where the settings hold something else."""
    numbers = settings.get(key) or usual
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != len(usual)
        or not all(isinstance(number, int | float) for number in numbers)
        or (key == "image_std" and 0 in numbers)
    ):
        raise BadInput(
            f"{view.source.folder}/{SETTINGS}: {key} is {numbers}, not {usual} or similar"
        )
    return tuple(numbers)


def _features(config: dict[str, Any]) -> int | None:
    """Features of an image in LLaVA models whose config does not count them."""
    vision = config.get("vision_config")
    held = vision if isinstance(vision, dict) else {}
    size, patch = held.get("image_size"), held.get("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1:
        return None
    patches = (size // patch) ** 2
    return patches + (config.get("vision_feature_select_strategy") == "full")


def _image_size(view: View) -> tuple[int, int, tuple[int, int]]:
    """Height, width, and rows and columns of tiles, none where the model takes no crops: as the
    graph says, else as many of both."""
    types = view.input_types()
    shape: tuple[Dim, ...] = types["pixel_values"].shape or ()
    crops, *_ = shape[1:-3] or (1,)
    size = [d for d in shape[-2:] if isinstance(d, int)]
    side = math.isqrt(crops - 1) if isinstance(crops, int) else 0
    tiles = read_grid(view.metadata()) or (side, side)
    if len(shape) not in (4, 5) or len(size) < 2 or crops != math.prod(tiles) + 1:
        raise BadInput(
            f"{view.source.name} takes images {types['pixel_values']}: images of files fit "
            "[batch, 3, height, width], or [batch, 5, 3, height, width] for a thumbnail and four "
            "quarters (10: nine tiles); give other inputs as .npz or .safetensors"
        )
    return size[0], size[1], tiles
