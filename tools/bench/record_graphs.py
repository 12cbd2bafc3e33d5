"""ONNX graphs that a record starts from, kept beside it without their weights.

What an exporter writes changes with its version and ours, and takes minutes. A kept graph stays;
its weights are put beside it, out of the zoo's checkpoint, when it is opened.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import onnx
import torch

from ... import export, load
from ...ir.core.view import View

DATA_FILE = "weights"
LEAST = 64
"""Floats from which on an initializer that has a weight's name is left out of the graph."""


def keep_graph(file: Path, view: View) -> None:
    """Export a graph and write it without the weights of ``view``, compressed, to ``file``."""
    with tempfile.TemporaryDirectory() as folder:
        export(view, Path(folder) / "whole")
        model = onnx.load(Path(folder) / "whole" / "model.onnx")
    known = view.weights()
    offset = 0
    for tensor in model.graph.initializer:
        count = int(torch.tensor(tensor.dims).prod())
        whole = tensor.data_type != onnx.TensorProto.FLOAT or count < LEAST
        if whole or _base(tensor.name) not in known:
            continue
        size = count * 4
        if len(tensor.raw_data) != size:
            raise ValueError(f"{tensor.name}: {len(tensor.raw_data)} bytes for {count} floats")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        offset += size
    file.write_bytes(gzip.compress(model.SerializeToString(deterministic=True), mtime=0))


def open_graph(file: Path, source: View) -> View:
    """The graph that ``keep_graph`` wrote, with the weights of ``source``, another graph of the
    same model. ``ValueError`` where a weight is not there or has another shape."""
    model = onnx.load_from_string(gzip.decompress(file.read_bytes()))
    known = source.weights()
    folder = tempfile.TemporaryDirectory(prefix="graphwright-record-")
    with (Path(folder.name) / DATA_FILE).open("wb") as data:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            weight = known.get(_base(tensor.name))
            if weight is None:
                raise ValueError(f"{file}: {source.source.name} has no weight for {tensor.name}")
            numbers = weight.read()
            numbers = numbers.T if tensor.name.endswith(".T") else numbers
            if list(numbers.shape) != list(tensor.dims) or numbers.dtype != torch.float32:
                raise ValueError(f"{file}: {tensor.name} is {list(tensor.dims)} there")
            data.write(numbers.contiguous().numpy().tobytes())
    path = Path(folder.name) / "model.onnx"
    path.write_bytes(model.SerializeToString())
    view = load(path)
    view.record_folder = folder  # type: ignore[attr-defined]  # goes when the graph does
    return view


def _base(name: str) -> str:
    return name.removesuffix(".T")
