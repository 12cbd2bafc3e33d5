"""What onnxruntime-genai needs to write text about images with an artifact.

Beside ``model.onnx``, which is the whole, lie its three parts over the same data file
(``backends.artifacts.pictured``), ``genai_config.json`` and ``genai_processor.json``, by which the
runtime makes every picture the size that the graph is for. A part that is given a picture of
another size all the same fails, and its message says the size. Which models the runtime knows is in
``backends.artifacts.genai_kinds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from ...ir.core.errors import BoundExceeded, Refusal
from ...ir.core.view import View
from ...ir.load.entry_files import SOUND_FILE
from ...ir.load.hf import gemma4, phi4_sound
from ...ir.load.hf.qwen_vl import patch_rows, token_places
from ...ir.load.side_files import longest_text, read_json
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import Rule, difference
from ...ir.structure.cache_slots import (
    POSITIONS,
    ROWS_KEY,
    STATES,
    STREAM,
    is_recurrent,
    is_state,
    past_slot,
)  # fmt: skip
from ...ir.structure.pictured import read_prompt
from ...ir.vocab.targets import CPU, GENAI, Target
from ..onnx.lowering import lowered
from ..onnx.model_files import DATA_FILE, MODEL_FILE, save_beside
from ..registry import compile
from .artifact import GENAI_FILE, PICTURED_FILES, PROCESSOR_FILE
from .genai import session, settings_of, special_tokens, strange_cache, write_genai_config
from .genai_kinds import Kind, check_prompt, dump, kind_of, processing, processor
from .genai_sounds import write_sounds
from .genai_words import settle_words
from .pictured import split
from .pictures import (
    CORNERS,
    FEATURES,
    FILLED,
    GRID,
    IDS,
    LOGITS,
    MASK,
    PIXELS,
    SIZE_CHECK,
    SIZES,
    Pictures,
    pictures_of,
)  # fmt: skip

VISION_START = 151652
"""``vision_start_token_id`` where a config is silent, as the library has it."""


def write_genai(graph: View, onnx: View, folder: Path, target: Target = CPU) -> list[str]:
    """Write what onnxruntime-genai needs beside ``model.onnx``, which is ``onnx``: of a decoder of
    text, or of a model of images and text; what a person should know of it, and of its words where
    it is written for that runtime. Raises as ``write_pictured``."""
    written = write_genai_config(onnx, folder, target)
    notes = [] if written else write_pictured(graph, folder, target)
    strange = "" if written or target.name != GENAI.name else strange_cache(onnx)
    if strange:
        notes = _refused(Refusal(strange))
    words = settle_words(folder) if (folder / GENAI_FILE).is_file() else []
    return notes + (words if target.name == GENAI.name else [])


def write_pictured(graph: View, folder: Path, target: Target = CPU) -> list[str]:
    """Write the files where ``graph``, whose ``model.onnx`` is there, is such a model; what a
    person should know of it.

    Before the folder takes its place ONNX Runtime runs the parts one behind the other: they must
    compute what ``model.onnx`` does. Raises ``BoundExceeded`` where they do not.
    """
    source, prompt = graph.source.folder, read_prompt(graph.metadata())
    config = read_json(source, "config.json")
    pictures = pictures_of(graph, config)
    cached = any(past_slot(name) is not None for name in graph.input_names())
    if not prompt or not cached or longest_text(source) is None:
        return []
    try:
        kind = kind_of(config)
    except Refusal as refusal:
        # Whoever asks for no other runtime is not told of each that lacks a family.
        return _refused(refusal) if target.name == GENAI.name else []
    try:
        if pictures is None:
            raise Refusal("the size of its images is not in config.json")
        check_prompt(kind, source, prompt)
        parts = split(graph, pictures, apart=kind.apart)
    except Refusal as refusal:
        return _refused(refusal)
    rows = {name: _write(part, folder / PICTURED_FILES[name], target, pictures)
            for name, part in parts.items()}  # fmt: skip
    _hold(graph, folder, pictures)
    if kind.apart:
        _take_any_rank(folder / PICTURED_FILES["embedding"])
    speech, silent = write_sounds(graph, folder, target)
    images = {"image_token_id": prompt[0]}
    if GRID in kind.inputs:
        images["vision_start_token_id"] = config.get("vision_start_token_id", VISION_START)
    dump(folder / GENAI_FILE, {
        "model": {
            "type": kind.type, "context_length": longest_text(source),
            **special_tokens(settings_of(source)), **images,
            **_with_sounds(_models(parts["text"], kind, pictures, target), kind, speech),
        },
        "search": {
            "max_length": longest_text(source),
            "past_present_share_buffer": rows["text"] == "shared",
        },
    })  # fmt: skip
    dump(folder / PROCESSOR_FILE, processor(kind, pictures, processing(source)))
    files = ", ".join(PICTURED_FILES.values())
    size = f"{pictures.height} x {pictures.width}"
    files += f", {SOUND_FILE}" if speech else ""
    notes = [f"onnxruntime-genai runs it by {files}, and makes every picture {size}"]
    return notes + ([silent] if silent else [])


def _with_sounds(
    models: dict[str, Any], kind: Kind, speech: Mapping[str, Any]
) -> dict[str, Any]:
    """The parts, with that of sounds; without one, with what the runtime is told then."""
    if not speech:
        return {**models, **kind.beside}
    rows = {phi4_sound.FEATURES: phi4_sound.FEATURES}
    inputs = {**models["embedding"]["inputs"], **rows}
    return {**models, "embedding": {**models["embedding"], "inputs": inputs}, "speech": speech}


def _refused(refusal: Refusal) -> list[str]:
    return [f"no {GENAI_FILE}, onnxruntime-genai does not run it: {refusal}"]


def _take_any_rank(path: Path) -> None:
    """Let features come as rows, or image by image: the runtime gives those of several images so,
    and none as rows."""
    model = onnx_ir.load(path)
    given = next(value for value in model.graph.inputs if value.name == FEATURES)
    width = given.shape[-1] if given.shape is not None else None
    assert isinstance(width, int)
    shape = onnx_ir.val(f"{FEATURES}.rows.shape", const_value=onnx_ir.tensor(
        [-1, width], dtype=onnx_ir.DataType.INT64, name=f"{FEATURES}.rows.shape"
    ))  # fmt: skip
    model.graph.initializers.add(shape)
    flat = onnx_ir.node("Reshape", [given, shape])
    flat.outputs[0].name = f"{FEATURES}.rows"
    given.replace_all_uses_with(flat.outputs[0])
    flat.replace_input_with(0, given)
    model.graph.insert_before(model.graph[0], flat)
    given.shape = None
    onnx_ir.save(model, path)


def _write(part: View, path: Path, target: Target, pictures: Pictures) -> str | None:
    """Write a part over the data of the whole; what ``ROWS_KEY`` says of it."""
    onnx = lowered(part, target)
    size = f"{pictures.height} x {pictures.width}"
    said = iter((SIZES, FILLED) if pictures.crop else (GRID,))
    for node in onnx.model.graph:
        names = [value.name or "" for value in node.inputs if value is not None]
        if node.op_type == "Gather" and any(name.startswith(SIZE_CHECK) for name in names):
            by = next(said, GRID)
            node.name = f"this model reads pictures of {size} pixels, and {by} says another size"
    save_beside(onnx.model, path, path.parent / MODEL_FILE, DATA_FILE)
    return onnx.metadata().get(ROWS_KEY)


def _models(
    text: View, kind: Kind, pictures: Pictures, target: Target
) -> dict[str, Any]:
    types = text.input_types()
    outputs = dict(zip(text.output_names(), map(text.type, text.outputs()), strict=True))
    caches = [name for name in types if past_slot(name) is not None]
    heads, size = ((types[caches[0]].shape or ())[axis] for axis in (1, 3))
    # Layers with a state of another kind are counted by their names, which are those of the source.
    states = [int(name.split(".")[1]) + 1 for name in types if is_state(name)]
    layers = max(states) if any(map(is_recurrent, types)) else len(caches) // 2
    squares = {"patch_size": pictures.side, "spatial_merge_size": pictures.merge}
    return {
        "vocab_size": (outputs[LOGITS].shape or ())[-1],
        "decoder": {
            "filename": PICTURED_FILES["text"], **session(target),
            # Of what is handed on, which is wider where early layers add features.
            "hidden_size": (types[STREAM].shape or ())[-1], "head_size": size,
            "num_key_value_heads": heads, "num_hidden_layers": layers,
            "inputs": {name: name for name in (STREAM, MASK, POSITIONS, IDS) if name in types}
            | _state_names(types, "past"),
            **_named_outputs(types),
        },
        "embedding": {
            "filename": PICTURED_FILES["embedding"], **session(target),
            "inputs": {name: name for name in (IDS, FEATURES)},
            "outputs": {STREAM: STREAM},
        },
        "vision": {
            "filename": PICTURED_FILES["vision"], **session(target),
            "config_filename": PROCESSOR_FILE, **squares,
            # Of Phi-4 it is one of two masks, and the runtime's word for it is that of the other.
            "inputs": {MASK if name == FILLED else name: name for name in kind.inputs},
            "outputs": {FEATURES: FEATURES},
        },
    }  # fmt: skip


def _state_names(types: Mapping[str, Any], side: str) -> dict[str, str]:
    """How the runtime names what layers keep that look at no token before, where there are such:
    its own names for these are others than ours."""
    held = {name.rpartition(".")[2] for name in types if is_recurrent(name)}
    return {f"{side}_{part}_names": f"{side}.%d.{part}" for part in STATES if part in held}


def _named_outputs(types: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    names = _state_names(types, "present")
    return {"outputs": names} if names else {}


def _hold(graph: View, folder: Path, pictures: Pictures) -> None:
    """Raise ``BoundExceeded`` where the parts give other logits than the whole, on one sample."""
    inputs = sample_inputs(graph)
    expected = compile(folder / MODEL_FILE)(**inputs)[LOGITS]
    vision, embedding, text = (compile(folder / file) for file in PICTURED_FILES.values())
    seen = _as_the_runtime_gives(graph, inputs, pictures)
    features = vision(**{name: seen[name] for name in (PIXELS, GRID, CORNERS, FILLED, SIZES)
                         if name in vision.input_names})[FEATURES]
    features = features.reshape(-1, features.shape[-1])
    stream = embedding(**{IDS: inputs[IDS], FEATURES: features})[STREAM]
    past = {name: value for name, value in inputs.items()
            if is_state(name) and name in text.input_names}  # fmt: skip
    beside = {name: seen[name] for name in (MASK, POSITIONS, IDS) if name in text.input_names}
    actual = text(**{STREAM: stream, **beside, **past})[LOGITS]
    apart = difference(expected, actual)
    if not Rule.of(graph).allows(apart):
        raise BoundExceeded(
            f"{', '.join(PICTURED_FILES.values())} give other logits than {MODEL_FILE} in ONNX "
            f"Runtime: {apart}. Update onnxruntime, or report the model"
        )


def _as_the_runtime_gives(
    graph: View, inputs: dict[str, torch.Tensor], pictures: Pictures
) -> dict[str, torch.Tensor]:
    """A graph's inputs, of Qwen's line with rows of patches, their grid, and tokens' places; of
    Gemma 4 with patches and theirs."""
    if pictures.placed:
        return inputs | _placed(inputs[PIXELS], pictures)
    if pictures.crop:
        size, pixels = torch.tensor([[pictures.height, pictures.width]]), inputs[PIXELS]
        filled = pixels.new_ones(*pixels.shape[:2], *[pictures.crop // pictures.side] * 2)
        return inputs | {SIZES: size.expand(len(pixels), -1), FILLED: filled}
    if not pictures.frames:
        return inputs
    pixels, ids, mask = inputs[PIXELS], inputs[IDS], inputs[MASK]
    squares = pictures.side, pictures.merge, pictures.frames
    rows = patch_rows(pixels, (pictures.rows, pictures.columns), squares).flatten(0, 1)
    size = torch.tensor([[1, pictures.rows, pictures.columns]] * len(pixels))
    grid = pictures.rows // pictures.merge, pictures.columns // pictures.merge
    shown = ids == read_prompt(graph.metadata())[0]
    places, _ = token_places(shown, mask, grid, mask.shape[1] - ids.shape[1])
    return {**inputs, PIXELS: rows, GRID: size, POSITIONS: places}


def _placed(pixels: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
    """``[images, 3, height, width]`` as rows of patches, channels last, and their places."""
    sides = pictures.rows, pictures.columns
    places = gemma4.patch_places(*sides).expand(len(pixels), -1, -1)
    return {PIXELS: gemma4.patch_rows(pixels, *sides), CORNERS: places}
