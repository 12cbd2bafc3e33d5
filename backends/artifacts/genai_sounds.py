"""Sounds for onnxruntime-genai: Phi-4-multimodal's tower beside the parts that see and write.

``speech.onnx`` takes the clips of a prompt, padded to one length, with a mask and the steps that
each has in the prompt, and gives these as rows; ``embedding.onnx`` puts them where the text has
their token. Of a sound file the runtime makes frames by ``genai_sounds.json``. The tower has the
source's own numbers, whatever passes made of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from ...ir.core.errors import GraphwrightError, Refusal, first_line
from ...ir.core.view import View
from ...ir.load.entry_files import SOUND_FILE
from ...ir.load.hf.phi4 import PHI4
from ...ir.load.hf.phi4_sound import FEATURES, FRAMES, HEARD, MODE, MOST_STEPS, SOUNDS
from ...ir.load.side_files import read_json
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Reference, Truth
from ...ir.vocab.targets import Target
from ..onnx.lowering import lowered
from ..onnx.model_files import DATA_FILE, MODEL_FILE, save_beside
from ..registry import compile
from .artifact import PICTURED_FILES, SOUND_PROCESSOR_FILE
from .genai import session
from .genai_kinds import dump, words_of
from .judging import Judge

SIZES = "audio_sizes"
TOKEN, WORD = 200011, "<|endoftext11|>"
"""The token of a sound that the runtime looks for and its word, whatever a config says."""
BANDS = 80
"""Of the frames that it makes."""
_IDS, _STREAM = "input_ids", "inputs_embeds"


def write_sounds(graph: View, folder: Path, target: Target) -> tuple[dict[str, Any], str]:
    """Write the files, of a model that hears, into a folder that has the other parts. The
    ``speech`` of its config, and why there is none where there is none."""
    source = graph.source.folder
    config = read_json(source, "config.json")
    if config.get("model_type") != PHI4:
        return {}, ""
    try:
        _check(source, config)
        view = load(str(source), part=SOUNDS, dtype=graph.input_types()["pixel_values"].dtype)
        onnx = lowered(view, target)
        check_length(onnx.model)
        as_rows(onnx.model)
        save_beside(onnx.model, folder / SOUND_FILE, folder / MODEL_FILE, DATA_FILE)
        _hold(view, folder / SOUND_FILE)
        take_rows(folder / PICTURED_FILES["embedding"])
    except GraphwrightError as error:
        (folder / SOUND_FILE).unlink(missing_ok=True)
        return {}, f"no graph of sounds: {first_line(error)}"
    dump(folder / SOUND_PROCESSOR_FILE, PROCESSOR)
    return {
        "filename": SOUND_FILE, "config_filename": SOUND_PROCESSOR_FILE, **session(target),
        "inputs": {FRAMES: FRAMES, "attention_mask": HEARD, SIZES: SIZES, MODE: MODE},
        "outputs": {FEATURES: FEATURES},
    }, ""  # fmt: skip


def _check(source: str | Path | None, config: Mapping[str, Any]) -> None:
    """Raise ``Refusal`` where the runtime would look for another token, or make other frames."""
    audio = config.get("audio_config")
    audio = audio if isinstance(audio, dict) else {}
    token, bands = audio.get("audio_token_id", TOKEN), audio.get("input_size", BANDS)
    if token != TOKEN:
        raise Refusal(f"{token} stands for a sound in config.json, and onnxruntime-genai looks for "
                      f"{TOKEN}")  # fmt: skip
    if bands != BANDS:
        raise Refusal(f"its tower hears {bands} bands, and onnxruntime-genai makes {BANDS}")
    words = words_of(source)
    if words and words.get(WORD) != TOKEN:
        raise Refusal(f"{WORD} is not token {TOKEN} of tokenizer.json")


def _hold(view: View, path: Path) -> None:
    """Raise ``BoundExceeded`` where ONNX Runtime gives something else than the graph."""
    samples = [sample_inputs(view)]
    judge = Judge(view, samples, Reference(view, samples, Truth()))
    shape = judge.expected[0][FEATURES].shape
    rows = compile(path)(**samples[0], **{SIZES: torch.full(shape[:1], shape[1])})[FEATURES]
    judge.judge([{FEATURES: rows.reshape(shape)}], path.name, "Report the model")


# --- nodes that no graph of ours has: how many rows there are depends on numbers ------------------


class _Nodes:
    """Adds nodes at the end of a model's graph."""

    def __init__(self, model: onnx_ir.Model, prefix: str) -> None:
        self._graph, self._prefix, self._count = model.graph, prefix, 0

    def __call__(self, op: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        node = onnx_ir.node(op, list(inputs), attributes)
        self._count += 1
        node.name = node.outputs[0].name = f"{self._prefix}.{op}.{self._count}"
        self._graph.append(node)
        return node.outputs[0]

    def constant(self, numbers: Any, dtype: Any = onnx_ir.DataType.INT64) -> onnx_ir.Value:
        self._count += 1
        name = f"{self._prefix}.constant.{self._count}"
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(numbers, dtype=dtype, name=name))
        self._graph.initializers.add(value)
        return value


def check_length(model: onnx_ir.Model) -> None:
    """Let the graph fail for sounds of more steps than it is for: a weight is read past its end,
    by a node whose name says why."""
    (steps,) = model.graph.outputs
    maker = steps.producer()
    assert maker is not None
    add = _Nodes(model, "sound_length")
    size = add("Gather", add("Shape", steps), add.constant(1))
    table = add.constant([0.0] * (MOST_STEPS + 1), steps.dtype)
    nothing = add("Gather", table, size)
    checker = nothing.producer()
    assert checker is not None
    checker.name = f"this model hears sounds of at most {MOST_STEPS} steps of audio_features"
    _give(model, add("Add", steps, nothing))


def as_rows(model: onnx_ir.Model) -> None:
    """Let the graph take ``audio_sizes`` i64 ``[clips]`` and give so many rows of each clip."""
    (steps,) = model.graph.outputs
    assert steps.shape is not None
    width, clips = steps.shape[2], steps.shape[0]
    sizes = onnx_ir.val(SIZES, dtype=onnx_ir.DataType.INT64, shape=onnx_ir.Shape([clips]))
    model.graph.inputs.append(sizes)
    add = _Nodes(model, "sound_rows")
    count = add("Gather", add("Shape", steps), add.constant(1))
    place = add("Range", add.constant(0), count, add.constant(1))
    counted = add("Less", place, add("Unsqueeze", sizes, add.constant([1])))
    flat = add("Reshape", counted, add.constant([-1]))
    rows = add("Reshape", steps, add.constant([-1, width]))
    given = _give(model, add("Compress", rows, flat, axis=0))
    given.shape = onnx_ir.Shape(["rows", width])


def take_rows(path: Path) -> None:
    """Let the part that puts features among the words take those of sounds, ``audio_features``
    ``[rows, width]``; none of them where a prompt has no sound."""
    model = onnx_ir.load(path)
    (stream,) = model.graph.outputs
    ids = next(value for value in model.graph.inputs if value.name == _IDS)
    assert stream.shape is not None
    width, dtype = stream.shape[2], stream.dtype
    given = onnx_ir.val(FEATURES, dtype=dtype, shape=onnx_ir.Shape(["sound_rows", width]))
    model.graph.inputs.append(given)
    add = _Nodes(model, "sounds")
    heard = add("Equal", add("Cast", ids, to=int(onnx_ir.DataType.INT64)), add.constant(TOKEN))
    flat = add("Cast", add("Reshape", heard, add.constant([-1])), to=int(onnx_ir.DataType.INT64))
    # Row 0 is of zeros: there is one to read where there is no sound.
    turn = add("Mul", add("CumSum", flat, add.constant(0)), flat)
    zeros = add.constant([[0.0] * int(width)], dtype)  # type: ignore[arg-type]
    table = add("Concat", zeros, given, axis=0)
    rows = add("Reshape", add("Gather", table, turn, axis=0), add("Shape", stream))
    where = add("Where", add("Unsqueeze", heard, add.constant([2])), rows, stream)
    _give(model, where)
    onnx_ir.save(model, path)


def _give(model: onnx_ir.Model, value: onnx_ir.Value) -> onnx_ir.Value:
    """Let the graph give this in the place of what it gave, under the same name."""
    (old,) = model.graph.outputs
    value.name, old.name = old.name, f"{old.name}.{len(model.graph)}"
    assert old.dtype is not None
    value.dtype, value.shape = old.dtype, old.shape
    model.graph.outputs[0] = value
    return value


def _frames(rate: str, size: int, hop: int) -> dict[str, Any]:
    """The frames of a sound: 25 ms every 10 ms."""
    return {
        f"stft_normal{rate}/n_fft": size, f"stft_normal{rate}/frame_length": hop * 5 // 2,
        f"stft_normal{rate}/hop_length": hop, f"stft_normal{rate}/win_fn": "hamming",
        f"logmel{rate}/chunk_size": 30, f"logmel{rate}/hop_length": hop,
        f"logmel{rate}/n_fft": 512, f"logmel{rate}/n_mel": BANDS,
        f"logmel{rate}/feature_first": 0, f"logmel{rate}/no_padding": 1,
    }  # fmt: skip


PROCESSOR: dict[str, Any] = {"feature_extraction": {"sequence": [
    {"operation": {"name": "audio_decoder", "type": "AudioDecoderEx",
                   "attrs": {"target_sample_rates": [8000, 16000]}}},
    {"operation": {"name": "phi_4_audio_embed", "type": "Phi4AudioEmbed", "attrs": {
        "audio_compression_rate": 8, **_frames("", 512, 160), **_frames("_8k", 256, 80)}}},
], "output_aligner": "phi4-audio-aligner"}}  # fmt: skip
"""What is done to a sound file; without the last word the runtime reads sizes of clips as 0."""
