"""Models of images and text that onnxruntime-genai knows, and how it makes pictures for each.

Its word for a model chooses the code that writes a picture's tokens into a prompt: their names are
in that code, and of Gemma 3 their number too. What is done to a picture file before is a list of
steps, which a file beside the model holds; the last of Qwen's line make rows of patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...ir.core.errors import Refusal
from ...ir.load.side_files import read_json
from .pictures import CORNERS, FILLED, GRID, PIXELS, SIZES, Pictures

Steps = list[tuple[str, dict[str, Any]]]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,) * 3, (0.5,) * 3
AS_READ = (0.0,) * 3, (1.0,) * 3
GEMMA_TOKENS = 256
"""Tokens of an image that the runtime writes for Gemma 3, whatever its config says."""
PHI_TOKEN = 200010
"""The token of an image that the runtime looks for, whatever the config of Phi-4 says."""
_RESAMPLE = {0: "NEAREST", 2: "LINEAR", 3: "CUBIC"}


@dataclass(frozen=True)
class Kind:
    """One of the runtime's types, for models of images of one size."""

    type: str
    """Its word for it."""
    tokens: tuple[str, ...]
    """Words of its prompts that the code looks for, the one that stands for a feature first."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = CLIP
    """Mean and deviation of pixels where no file beside the model says others."""
    resample: int = 3
    """As Pillow numbers them, where no file says another."""
    processor: str = "qwen2_5_image_processor"
    flag: str | None = "qwen2_5_vl"
    """Of the step that normalizes: lets pixels lie as rows of patches are made of them."""
    last: Callable[[Pictures], Steps] = lambda pictures: [("PatchImage", {
        "patch_size": pictures.side, "temporal_patch_size": pictures.frames,
        "merge_size": pictures.merge,
    })]  # fmt: skip
    """What is done to pixels at the end."""
    whole: Callable[[Pictures], Steps] | None = None
    """In place of all that is done to pixels behind the step that gives them their size."""
    apart: bool = False
    """Whether features of several images are handed on image by image."""
    inputs: tuple[str, ...] = (PIXELS, GRID)
    """Of the tower."""
    wired: Mapping[str, list[str]] = field(default_factory=dict)
    """Steps that take other results than the one of the step before, by their types."""
    aligner: str | None = None
    """What puts several pictures together."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else the runtime wants to be told of such a model."""


def _first_channels(_: Pictures) -> Steps:
    return [("Permute3D", {"dims": [2, 0, 1]})]


def _in_crops(pictures: Pictures) -> Steps:
    side = pictures.crop
    return [
        ("Phi4VisionDynamicPreprocess", {
            "dynamic_hd": pictures.height * pictures.width // side**2,
            "dyhd_base_resolution": side,
        }),
        ("Rescale", {"rescale_factor": 1 / 255}), ("Normalize", {"mean": HALF[0], "std": HALF[1]}),
        ("Phi4VisionProcessor", {"dyhd_base_resolution": side, "interpolation": "CUBIC"}),
    ]  # fmt: skip


_QWEN = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
_MISTRAL = Kind(
    "mistral3", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), processor="pixtral_image_processor",
    flag=None, last=lambda pictures: [*_first_channels(pictures), ("PixtralImageSizes", {})],
    inputs=(PIXELS,),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), Kind("qwen2_5_vl", _QWEN)),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), Kind("qwen3_vl", _QWEN, HALF, flag="qwen3_vl")),
    **{name: Kind(name, _QWEN, HALF, flag="qwen3_vl") for name in ("qwen3_5", "qwen3_5_moe")},
    "gemma3": Kind(
        "gemma3", ("<image_soft_token>", "<start_of_image>", "<end_of_image>"), HALF, 2,
        "gemma_3_image_processing", None, _first_channels, apart=True, inputs=(PIXELS,),
    ),
    "gemma4": Kind(
        "gemma4", ("<|image|>", "<|image>", "<image|>"), AS_READ, flag=None,
        processor="gemma_4_image_processing", inputs=(PIXELS, CORNERS),
        # It looks for a model of sounds unless it is told of none (0.18).
        beside={"speech": {"config_filename": ""}},
        whole=lambda pictures: [("Gemma4ImageTransform", {
            "patch_size": pictures.side, "pooling_kernel_size": pictures.merge,
            # As many as the picture has, which is then neither stretched nor filled up.
            "max_soft_tokens": pictures.rows * pictures.columns // pictures.merge**2,
        })],
    ),
    "mistral3": _MISTRAL,
    "phi4_multimodal": Kind(
        "phi4mm", ("<|endoftext10|>",), HALF, flag=None, processor="phi_4_vision_processor",
        inputs=(PIXELS, FILLED, SIZES), beside={"speech": {"config_filename": ""}}, whole=_in_crops,
        wired={"Rescale": [":0"], "Phi4VisionProcessor": [
            ":0", "phi4visiondynamicpreprocess:1"]},  # not the mask that comes between
        aligner="phi4-vision-aligner",
    ),
}  # fmt: skip
"""By model type: images of Qwen2-VL have the places of Qwen2.5-VL's."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What the runtime takes a model for, by its ``config.json``. Raises ``Refusal`` where it has
    no type whose pictures are given as this model's."""
    name, vision = config.get("model_type"), config.get("vision_config")
    if name == "llava" and isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        return _MISTRAL  # Pixtral 12B: the same prompts, and one token a patch
    if name not in KINDS:
        raise Refusal(
            f"it has no type for pictures in a prompt of {name}; of models that are read here it "
            f"knows {', '.join(KINDS)}, and Pixtral under LLaVA's name"
        )
    return KINDS[str(name)]


def check_prompt(kind: Kind, source: str | Path | None, prompt: tuple[int, ...]) -> None:
    """Raise ``Refusal`` where the runtime would write other tokens for an image than ``prompt``,
    those that the graph looks for: of another number, or by words that the tokenizer lacks."""
    if kind.type == "gemma3" and len(prompt) != GEMMA_TOKENS:
        raise Refusal(
            f"an image is {len(prompt)} tokens (mm_tokens_per_image), and it writes "
            f"{GEMMA_TOKENS} for every one of Gemma 3"
        )
    if kind.type == "phi4mm" and prompt[0] != PHI_TOKEN:
        raise Refusal(
            f"{prompt[0]} stands for an image in config.json, and it looks for {PHI_TOKEN} in "
            "every prompt of Phi-4-multimodal"
        )
    ids = words_of(source)
    missing = [word for word in kind.tokens if word not in ids] if ids else []
    if missing:
        raise Refusal(f"its prompts have {', '.join(missing)}, which tokenizer.json lacks")
    if ids and ids[kind.tokens[0]] != prompt[0]:
        raise Refusal(
            f"{kind.tokens[0]} is token {ids[kind.tokens[0]]} of tokenizer.json, and "
            f"{prompt[0]} stands for an image in config.json"
        )


def words_of(source: str | Path | None) -> dict[str, int]:
    """Added tokens and vocabulary of ``tokenizer.json``; empty where there is none."""
    content = read_json(source, "tokenizer.json")
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    words = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    tokens = [token for token in added or [] if isinstance(token, dict)]
    return words | {str(token.get("content")): token.get("id") for token in tokens}


def processing(source: str | Path | None) -> dict[str, Any]:
    """What the library's processor does to a picture, by its files; empty where there are none.
    Since version 5 of transformers one file holds what several did."""
    inner = read_json(source, "processor_config.json").get("image_processor")
    return {**(inner if isinstance(inner, dict) else {}),
            **read_json(source, "preprocessor_config.json")}  # fmt: skip


def processor(kind: Kind, pictures: Pictures, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is done to a picture: it gets the graph's size, whatever its own is."""
    mean, std = kind.statistics
    flag = {kind.flag: 1} if kind.flag else {}
    # ConvertRGB turns the order of channels round, and the step with a flag turns it back (0.18).
    turned: Steps = [("ConvertRGB", {})] if kind.flag else []
    steps: Steps = [
        ("DecodeImage", {"color_space": "RGB"}),
        *turned,
        ("Resize", {
            "width": pictures.width, "height": pictures.height, "keep_aspect_ratio": 0,
            "interpolation": _RESAMPLE.get(settings.get("resample", kind.resample), "CUBIC"),
        }),
    ]  # fmt: skip
    steps += kind.whole(pictures) if kind.whole is not None else [
        ("Rescale", {"rescale_factor": settings.get("rescale_factor", 1 / 255)}),
        ("Normalize", {
            "mean": list(settings.get("image_mean") or mean),
            "std": list(settings.get("image_std") or std), **flag,
        }),
        *kind.last(pictures),
    ]  # fmt: skip
    operations = [
        {"operation": {"name": step.lower(), "type": step, "attrs": attrs}
         | ({"inputs": kind.wired[step]} if step in kind.wired else {})}
        for step, attrs in steps
    ]  # fmt: skip
    aligned = {"output_aligner": kind.aligner} if kind.aligner else {}
    return {"processor": {"name": kind.processor, "transforms": operations, **aligned}}


def dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
