"""ONNX files: the proto is read, external data stays on disk."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from ..canonical.nbit import canonicalize_stored
from ..core.errors import BadInput
from ..core.quiet import quiet
from ..core.tensors import weight_of
from ..core.view import Source
from ..onnx.view import OnnxView
from .bitstack_size import cut
from .onnx_proto import read_model

MIN_OPSET = 18
"""The vocabulary reads axes as operands, as they are since opset 18."""


def load_onnx(path: Path, max_bytes: int | None = None) -> OnnxView:
    """The graph of an ONNX file. Models older than opset 18 are converted to it, and linears stored
    in few bits are read as such (``canonical.nbit``).

    External data is checked (there, in the model's folder, long enough), never read. ``max_bytes``
    leaves blocks of stacked weights away (``bitstack_size.cut``); their data need not be there.

    Raises ``Missing`` for an absent file, ``BadInput`` for one that is damaged, cut short,
    reaches outside its folder, cannot be converted, or does not get as small as that.
    """
    # Without a folder in front, onnx-ir skips its own check that external data stays inside.
    path = path.absolute()
    model = read_model(path)
    if max_bytes is not None:
        cut(model, path, max_bytes)
    external = _check_external_data(model)
    _check_inputs(model.graph, path)
    model = _modern(model, path)
    files = (path, *sorted(external))
    view = OnnxView(
        model,
        source=Source(
            kind="onnx",
            name=str(path),
            folder=str(path.parent),
            files=files,
            source_bytes=sum(f.stat().st_size for f in files),
        ),
    )
    canonicalize_stored(view)
    return view


def _check_external_data(model: onnx_ir.Model) -> set[Path]:
    """The data files that the model's tensors name, each tensor checked against its file."""
    found: set[Path] = set()
    for tensor in _tensors(model):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            weight_of(tensor)
            found.add(Path(tensor.path))
    return found


def _tensors(model: onnx_ir.Model) -> list[onnx_ir.TensorProtocol]:
    graphs: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    tensors: list[onnx_ir.TensorProtocol] = []
    while graphs:
        graph = graphs.pop()
        if isinstance(graph, onnx_ir.Graph):
            values = graph.initializers.values()
            tensors += [v.const_value for v in values if v.const_value is not None]
        for attr in (a for node in graph for a in node.attributes.values() if not a.is_ref()):
            if attr.type == onnx_ir.AttributeType.TENSOR:
                tensors.append(attr.value)
            elif attr.type == onnx_ir.AttributeType.GRAPH:
                graphs.append(attr.value)
            elif attr.type == onnx_ir.AttributeType.GRAPHS:
                graphs.extend(attr.value)
    return tensors


def _check_inputs(graph: onnx_ir.Graph, path: Path) -> None:
    """A file cut at the border of two fields still parses: what is missing shows in its users."""
    known = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    known |= {id(v) for node in graph for v in node.outputs}
    for node in graph:
        for value in node.inputs:
            if value is not None and id(value) not in known:
                raise BadInput(
                    f"{path}: the node {node.name or node.op_type} ({node.op_type}) reads "
                    f"{value.name!r}, which nothing makes: the file is damaged or cut short"
                )
    for value in graph.outputs:
        if id(value) not in known:
            raise BadInput(f"{path}: nothing makes the output {value.name!r}: the file is damaged")


def _modern(model: onnx_ir.Model, path: Path) -> onnx_ir.Model:
    opset = model.opset_imports[""]
    if opset >= MIN_OPSET:
        return model
    from onnxscript import version_converter

    advice = (
        f"opset {opset} is older than {MIN_OPSET} and cannot be converted here; export the model "
        f"again with opset_version={MIN_OPSET} or later"
    )
    with quiet():
        try:
            version_converter.convert_version(model, target_version=MIN_OPSET, fallback=True)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(f"{path}: {advice} ({reason})") from error
    if model.opset_imports[""] != MIN_OPSET:
        raise BadInput(f"{path}: {advice}")
    return model
