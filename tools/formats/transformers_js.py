"""The layout of transformers.js: ``onnx/model_q4.onnx`` beside the configs.

Suffixes of dtypes, ``config.json``'s ``transformers.js_config`` and the data file's name are those
of @huggingface/transformers 4.3. The graph and its numbers are the artifact's; the data file has
another name, which the graph's file holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx

from ...backends.artifacts.artifact import SIDE_FILES, copy_side_files
from ...backends.onnx.model_files import DATA_FILE, MODEL_FILE
from ...ir.core.errors import BadInput
from ...ir.load.side_files import read_json

BROWSER_BYTES = 2**31
"""A browser takes no file of so many bytes at once."""
_SUFFIXES = {0: ("", "fp32"), 2: ("_q2", "q2"), 4: ("_q4", "q4"), 8: ("_quantized", "q8")}
"""Ends of file names, and what the library calls the dtype, by the bits of most weights."""
_HALF = {0: ("_fp16", "fp16"), 2: ("_q2f16", "q2f16"), 4: ("_q4f16", "q4f16")}
"""The same of graphs that compute in float16; of 8 bits the library has no name for them."""


def write_layout(artifact: Path, out: Path) -> list[str]:
    """Write the folder; what a person should know of it. Raises ``BadInput`` without a config."""
    config = read_json(artifact, SIDE_FILES[0])
    if not config:
        raise BadInput(f"{artifact} has no config.json, which transformers.js reads first")
    model = onnx.load(artifact / MODEL_FILE, load_external_data=False)
    suffix, dtype = file_form(model.graph)
    name = f"model{suffix}.onnx"
    data = artifact / DATA_FILE
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            entry.value = f"{name}_data" if entry.key == "location" else entry.value
    (out / "onnx").mkdir()
    onnx.save(model, out / "onnx" / name)
    settings: dict[str, object] = {"dtype": dtype}
    if dtype in {called for _, called in _HALF.values()}:
        settings["kv_cache_dtype"] = {dtype: "float16"}
    notes = [f"onnx/{name}, dtype {dtype}"]
    if data.is_file():
        shutil.copyfile(data, out / "onnx" / f"{name}_data")
        settings["use_external_data_format"] = {name: 1}
        if data.stat().st_size >= BROWSER_BYTES:
            notes.append(f"{name}_data is above 2 GB: Node takes it, a browser does not")
    copy_side_files(str(artifact), out)
    described = {**config, "transformers.js_config": settings}
    (out / SIDE_FILES[0]).write_text(json.dumps(described, indent=2) + "\n")
    return notes


def file_form(graph: onnx.GraphProto) -> tuple[str, str]:
    """The end of the file's name, and what the library calls the dtype."""
    bits = _bits(graph)
    half = [o.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for o in graph.output]
    return _HALF[bits] if any(half) and bits in _HALF else _SUFFIXES[bits]


def _bits(graph: onnx.GraphProto) -> int:
    """Of most quantized linears of the graph; 0 where there are none."""
    sizes = [a.i for node in graph.node if node.op_type == "MatMulNBits"
             for a in node.attribute if a.name == "bits"]  # fmt: skip
    most = max(sizes, key=sizes.count) if sizes else 0
    return most if most in _SUFFIXES else 4


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a graph and of those within."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner) if inner.node else ()
