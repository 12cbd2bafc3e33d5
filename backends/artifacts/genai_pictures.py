"""What onnxruntime-genai needs to write text about images with an artifact of Qwen's line.

Beside ``model.onnx``, which is the whole, lie its three parts over the same data file
(``backends.artifacts.pictured``), ``genai_config.json`` and ``genai_processor.json``, by which the
runtime makes every picture the size that the graph is for. A part that is given a picture of
another size all the same fails, and its message says the size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...ir.core.errors import BoundExceeded, Refusal
from ...ir.core.view import View
from ...ir.load.hf_qwen_vl import patch_rows, token_places
from ...ir.load.side_files import longest_text, read_json, text_settings
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import Rule, difference
from ...ir.structure.cache_slots import POSITIONS, ROWS_KEY, STREAM, past_slot
from ...ir.structure.pictured import read_prompt
from ...ir.vocab.targets import CPU, Target
from ..onnx.lowering import lowered
from ..onnx.model_files import DATA_FILE, MODEL_FILE, save_beside
from ..registry import compile
from .artifact import GENAI_FILE, PICTURED_FILES, PROCESSOR_FILE
from .genai import known, session, special_tokens
from .pictured import (
    FEATURES,
    GRID,
    IDS,
    LOGITS,
    MASK,
    PIXELS,
    SIZE_CHECK,
    Pictures,
    pictures_of,
    split,
)  # fmt: skip

TYPES = {"qwen2_vl": "qwen2_5_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl",
         "qwen3_vl_moe": "qwen3_vl"}
"""The runtime's word for a model type: images of Qwen2-VL have the places of Qwen2.5-VL's."""
VISION_START = 151652
"""``vision_start_token_id`` where a config is silent, as the library has it."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP, where no ``preprocessor_config.json`` says others."""
_RESAMPLE = {0: "NEAREST", 2: "LINEAR", 3: "CUBIC"}


def write_pictured(graph: View, folder: Path, target: Target = CPU) -> list[str]:
    """Write the files where ``graph``, whose ``model.onnx`` is there, is such a model; what a
    person should know of it.

    Before the folder takes its place ONNX Runtime runs the parts one behind the other: they must
    compute what ``model.onnx`` does. Raises ``BoundExceeded`` where they do not.
    """
    source, pictures = graph.source.folder, pictures_of(graph.metadata())
    config = read_json(source, "config.json")
    kind = TYPES.get(str(config.get("model_type")))
    cached = any(past_slot(name) is not None for name in graph.input_names())
    if pictures is None or kind is None or not cached or longest_text(source) is None:
        return []
    try:
        parts = split(graph, pictures)
    except Refusal as refusal:
        return [f"no {GENAI_FILE}, onnxruntime-genai does not run it: {refusal}"]
    rows = {name: _write(part, folder / PICTURED_FILES[name], target, pictures)
            for name, part in parts.items()}  # fmt: skip
    settings = {**text_settings(config), **known(read_json(source, "generation_config.json"))}
    images = {
        "image_token_id": read_prompt(graph.metadata())[0],
        "vision_start_token_id": config.get("vision_start_token_id", VISION_START),
    }
    _dump(folder / GENAI_FILE, {
        "model": {
            "type": kind, "context_length": longest_text(source),
            **special_tokens(settings), **images, **_models(parts["text"], pictures, target),
        },
        "search": {
            "max_length": longest_text(source),
            "past_present_share_buffer": rows["text"] == "shared",
        },
    })  # fmt: skip
    processing = read_json(source, "preprocessor_config.json")
    _dump(folder / PROCESSOR_FILE, _processor(pictures, processing))
    _hold(graph, folder, pictures)
    files = ", ".join(PICTURED_FILES.values())
    size = f"{pictures.height} x {pictures.width}"
    return [f"onnxruntime-genai runs it by {files}, and makes every picture {size}"]


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write(part: View, path: Path, target: Target, pictures: Pictures) -> str | None:
    """Write a part over the data of the whole; what ``ROWS_KEY`` says of it."""
    onnx = lowered(part, target)
    size = f"{pictures.height} x {pictures.width}"
    for node in onnx.model.graph:
        if any(value is not None and value.name == SIZE_CHECK for value in node.inputs):
            node.name = f"this model reads pictures of {size} pixels, and {GRID} says another size"
    save_beside(onnx.model, path, path.parent / MODEL_FILE, DATA_FILE)
    return onnx.metadata().get(ROWS_KEY)


def _models(text: View, pictures: Pictures, target: Target) -> dict[str, Any]:
    types = dict(zip(text.input_names(), map(text.type, text.inputs()), strict=True))
    outputs = dict(zip(text.output_names(), map(text.type, text.outputs()), strict=True))
    caches = [name for name in types if past_slot(name) is not None]
    heads, size = ((types[caches[0]].shape or ())[axis] for axis in (1, 3))
    return {
        "vocab_size": (outputs[LOGITS].shape or ())[-1],
        "decoder": {
            "filename": PICTURED_FILES["text"], **session(target),
            "hidden_size": (types[STREAM].shape or ())[-1], "head_size": size,
            "num_key_value_heads": heads, "num_hidden_layers": len(caches) // 2,
            "inputs": {name: name for name in (STREAM, MASK, POSITIONS)},
        },
        "embedding": {
            "filename": PICTURED_FILES["embedding"], **session(target),
            "inputs": {name: name for name in (IDS, FEATURES)},
            "outputs": {STREAM: STREAM},
        },
        "vision": {
            "filename": PICTURED_FILES["vision"], **session(target),
            "config_filename": PROCESSOR_FILE, "patch_size": pictures.side,
            "spatial_merge_size": pictures.merge,
            "inputs": {name: name for name in (PIXELS, GRID)},
            "outputs": {FEATURES: FEATURES},
        },
    }  # fmt: skip


def _processor(pictures: Pictures, settings: dict[str, Any]) -> dict[str, Any]:
    """What is done to a picture: it gets the graph's size, whatever its own is."""
    patches = {
        "patch_size": pictures.side, "temporal_patch_size": pictures.frames,
        "merge_size": pictures.merge,
    }  # fmt: skip
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        ("Resize", {
            "width": pictures.width, "height": pictures.height, "keep_aspect_ratio": 0,
            "interpolation": _RESAMPLE.get(settings.get("resample", 3), "CUBIC"),
        }),
        ("Rescale", {"rescale_factor": settings.get("rescale_factor", 1 / 255)}),
        ("Normalize", {
            "mean": list(settings.get("image_mean") or MEAN),
            "std": list(settings.get("image_std") or STD), "qwen2_5_vl": 1,
        }),
        ("PatchImage", patches),
    ]  # fmt: skip
    operations = [{"operation": {"name": kind.lower(), "type": kind, "attrs": attrs}}
                  for kind, attrs in steps]  # fmt: skip
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": operations}}


def _hold(graph: View, folder: Path, pictures: Pictures) -> None:
    """Raise ``BoundExceeded`` where the parts give other logits than the whole, on one sample."""
    inputs = sample_inputs(graph)
    expected = compile(folder / MODEL_FILE)(**inputs)[LOGITS]
    pixels, ids, mask = inputs[PIXELS], inputs[IDS], inputs[MASK]
    squares = pictures.side, pictures.merge, pictures.frames
    rows = patch_rows(pixels, (pictures.rows, pictures.columns), squares).flatten(0, 1)
    size = torch.tensor([[1, pictures.rows, pictures.columns]] * len(pixels))
    grid = pictures.rows // pictures.merge, pictures.columns // pictures.merge
    shown = ids == read_prompt(graph.metadata())[0]
    past = {name: value for name, value in inputs.items() if past_slot(name) is not None}
    length = mask.shape[1] - ids.shape[1]
    places, _ = token_places(shown, mask, grid, length)
    vision, embedding, text = (compile(folder / file) for file in PICTURED_FILES.values())
    features = vision(**{PIXELS: rows, GRID: size})[FEATURES]
    stream = embedding(**{IDS: ids, FEATURES: features})[STREAM]
    actual = text(**{STREAM: stream, MASK: mask, POSITIONS: places, **past})[LOGITS]
    apart = difference(expected, actual)
    if not Rule.of(graph).allows(apart):
        raise BoundExceeded(
            f"{', '.join(PICTURED_FILES.values())} give other logits than {MODEL_FILE} in ONNX "
            f"Runtime: {apart}. Update onnxruntime, or report the model"
        )
